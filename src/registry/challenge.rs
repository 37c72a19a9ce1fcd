//! What a server asks for when it answers 401: the header `WWW-Authenticate` (RFC 9110, section 11.6.1).

use std::collections::BTreeMap;

/// One way to prove who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    /// In lower case.
    pub(super) scheme: String,
    /// Names in lower case.
    pub(super) parameters: BTreeMap<String, String>,
}

/// The challenges of one header. What cannot be understood ends the list.
pub(super) fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            return challenges;
        }
        let value = after.trim_start_matches([' ', '\t']);
        match (value.strip_prefix('='), challenges.last_mut()) {
            // A parameter of the challenge before it.
            (Some(value), Some(challenge)) if !value.starts_with('=') => {
                let Some((value, after)) = parameter(value.trim_start_matches([' ', '\t'])) else { return challenges };
                challenge.parameters.entry(word.to_ascii_lowercase()).or_insert(value);
                rest = after;
            }
            // A token68 of a scheme we do not speak.
            (Some(_), Some(_)) => match value.split_once(',') {
                Some((_, after)) => rest = after,
                None => return challenges,
            },
            (Some(_), None) => return challenges,
            (None, _) => {
                challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: BTreeMap::new() });
                rest = after;
            }
        }
    }
}

/// A token or a quoted string, and what follows it.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| !is_token(c)).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        return Some((word.to_owned(), rest));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((place, character)) = characters.next() {
        match character {
            '"' => return Some((value, quoted.get(place + 1..)?)),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_taken_apart() {
        for (header, expected) in [
            ("Basic realm=\"a b\"", vec![("basic", vec![("realm", "a b")])]),
            (
                r#"Bearer realm="https://auth.example/token",service="r",scope="repository:a/b:pull,push""#,
                vec![(
                    "bearer",
                    vec![
                        ("realm", "https://auth.example/token"),
                        ("service", "r"),
                        ("scope", "repository:a/b:pull,push"),
                    ],
                )],
            ),
            (
                r#"Basic realm="x", Bearer Realm = token , service="q\"uote""#,
                vec![("basic", vec![("realm", "x")]), ("bearer", vec![("realm", "token"), ("service", "q\"uote")])],
            ),
            ("Negotiate, Basic realm=x", vec![("negotiate", vec![]), ("basic", vec![("realm", "x")])]),
            ("Bearer realm=\"unclosed", vec![("bearer", vec![])]),
            ("Negotiate abc==, Basic realm=x", vec![("negotiate", vec![]), ("basic", vec![("realm", "x")])]),
            ("", vec![]),
            ("=x", vec![]),
            ("realm=\"x\"", vec![]),
            ("Bearer realm=\"a\", realm=\"b\"", vec![("bearer", vec![("realm", "a")])]),
        ] {
            let found: Vec<(String, Vec<(String, String)>)> =
                parse(header).into_iter().map(|c| (c.scheme, c.parameters.into_iter().collect())).collect();
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            let mut expected: Vec<(String, Vec<(String, String)>)> =
                expected.iter().map(|(s, p)| ((*s).to_owned(), p.iter().map(owned).collect())).collect();
            for (_, parameters) in &mut expected {
                parameters.sort();
            }
            assert_eq!(found, expected, "{header}");
        }
    }
}
