//! What must not be seen: passwords, tokens, and the parts of addresses that hold them.
//!
//! A [`Secret`] shows itself to no formatter; a [`SafeUrl`] shows an address without user, query and fragment, where
//! object stores put their signatures.

use std::fmt;

use url::Url;

/// A password or token. `Debug` and `Display` show three stars.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    /// Hides `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub(super) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// An address as it may stand in a log line or an error: scheme, host, port and path.
#[derive(Clone, PartialEq, Eq)]
pub struct SafeUrl(String);

impl From<&Url> for SafeUrl {
    fn from(url: &Url) -> Self {
        Self(format!("{}{}", url.origin().ascii_serialization(), url.path()))
    }
}

impl fmt::Display for SafeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SafeUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A foreign message, fit for a line of a log: printable, on one line, at most 200 characters.
pub(super) fn printable(text: &str) -> String {
    const LIMIT: usize = 200;
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut out: String = text.trim().chars().take(LIMIT).map(clean).collect();
    if text.trim().chars().nth(LIMIT).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_shown() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?} {:#?}", Some(&secret)), "*** *** Some(\n    ***,\n)");
        let url = Url::parse("https://me:hunter2@store.example:8443/a/b?X-Amz-Signature=hunter2#x").unwrap();
        assert_eq!(SafeUrl::from(&url).to_string(), "https://store.example:8443/a/b");
    }

    #[test]
    fn foreign_messages_stay_on_one_short_line() {
        assert_eq!(printable(" a\r\nb\u{1b}[31m "), "a  b [31m");
        assert_eq!(printable(&"x".repeat(300)).chars().count(), 201);
    }
}
