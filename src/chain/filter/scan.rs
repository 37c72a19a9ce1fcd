//! The tokens of a filter.

use super::FilterError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token<'a> {
    End,
    /// With its quotes.
    Quoted(&'a str),
    Field(&'a str),
    Value(&'a str),
    Operator(&'a str),
    Separator,
    Other,
}

#[derive(Debug)]
pub(super) struct Scanner<'a> {
    text: &'a str,
    /// Where the last token began.
    token: usize,
    next: usize,
    /// After an operator and before the value: everything up to a comma is one token there.
    value: bool,
}

impl<'a> Scanner<'a> {
    pub(super) const fn new(text: &'a str) -> Self {
        Self { text, token: 0, next: 0, value: false }
    }

    pub(super) const fn error(&self, what: &'static str) -> FilterError {
        FilterError::Syntax { what, at: self.token }
    }

    /// The next character, white space included.
    pub(super) fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.next..).unwrap_or_default()
    }

    pub(super) fn scan(&mut self) -> Result<Token<'a>, FilterError> {
        self.next = self.text.len() - self.rest().trim_start().len();
        self.token = self.next;
        let Some(first) = self.peek() else { return Ok(Token::End) };
        match first {
            '"' | '/' | '|' => self.quoted(first),
            ',' | '.' => {
                self.value = false;
                self.next += 1;
                Ok(Token::Separator)
            }
            '=' | '!' | '~' => {
                self.value = true;
                Ok(Token::Operator(self.take_while(|c| matches!(c, '=' | '!' | '~'))))
            }
            c if self.value && is_value(c) => {
                self.value = false;
                Ok(Token::Value(self.take_while(is_value)))
            }
            c if is_field(c) => Ok(Token::Field(self.take_while(is_field))),
            _ => Ok(Token::Other),
        }
    }

    fn take_while(&mut self, belongs: fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let length = rest.find(|c| !belongs(c)).unwrap_or(rest.len());
        self.next += length;
        rest.get(..length).unwrap_or_default()
    }

    fn quoted(&mut self, quote: char) -> Result<Token<'a>, FilterError> {
        let rest = self.rest();
        let mut escaped = false;
        for (at, c) in rest.char_indices().skip(1) {
            if c == '\n' {
                break;
            }
            if !escaped && c == quote {
                let length = at + 1;
                self.next += length;
                return Ok(Token::Quoted(rest.get(..length).unwrap_or_default()));
            }
            escaped = !escaped && c == '\\';
        }
        Err(self.error("a quoted text has no end"))
    }
}

const fn is_field(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

fn is_value(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}

/// What stands between the quotes, escapes resolved as Go does. None if one is wrong or the bytes are no text.
pub(super) fn unquote(quoted: &str) -> Option<String> {
    let quote = quoted.chars().next()?;
    let mut rest = quoted.strip_prefix(quote)?.strip_suffix(quote)?.chars();
    let mut bytes: Vec<u8> = Vec::new();
    while let Some(c) = rest.next() {
        if c != '\\' {
            push(&mut bytes, c);
            continue;
        }
        let escape = rest.next()?;
        match escape {
            'a' => bytes.push(0x07),
            'b' => bytes.push(0x08),
            'f' => bytes.push(0x0c),
            'n' => bytes.push(b'\n'),
            'r' => bytes.push(b'\r'),
            't' => bytes.push(b'\t'),
            'v' => bytes.push(0x0b),
            '\\' => bytes.push(b'\\'),
            'x' => bytes.push(u8::try_from(number(&mut rest, 2, 16)?).ok()?),
            'u' => push(&mut bytes, char::from_u32(number(&mut rest, 4, 16)?)?),
            'U' => push(&mut bytes, char::from_u32(number(&mut rest, 8, 16)?)?),
            '0'..='7' => {
                let first = escape.to_digit(8)?;
                bytes.push(u8::try_from(first * 64 + number(&mut rest, 2, 8)?).ok()?);
            }
            c if c == quote => push(&mut bytes, c),
            _ => return None,
        }
    }
    String::from_utf8(bytes).ok()
}

fn number(rest: &mut std::str::Chars<'_>, digits: u32, base: u32) -> Option<u32> {
    (0..digits).try_fold(0_u32, |sum, _| sum.checked_mul(base)?.checked_add(rest.next()?.to_digit(base)?))
}

fn push(bytes: &mut Vec<u8>, c: char) {
    bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}
