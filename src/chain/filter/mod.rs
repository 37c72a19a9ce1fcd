//! containerd's filter language, as far as it is about snapshots.
//!
//! ```text
//! selectors := selector ("," selector)*          all of them have to match
//! selector  := fieldpath (operator value)?       without an operator: the field is there
//! fieldpath := field ("." field)*                name, parent, kind, labels.<the rest, joined with dots>
//! field     := quoted | [A-Za-z0-9_]+
//! operator  := "==" | "!=" | "~="                equal, not equal, matches the regular expression
//! value     := quoted | all up to "," or white space
//! quoted    := "…" with the escapes of Go; after "~=" also /…/ and |…|
//! ```
//!
//! Of several filters one has to match; no filter, or an empty one, matches everything. A field that is missing is
//! unequal to everything and equal to nothing; `parent` is always there, if empty.

mod scan;

use regex::{Regex, RegexBuilder};
use scan::{Scanner, Token};

use super::{ChainError, Invalid, Snapshot};

/// Memory that one regular expression may take. Filters come from local clients; the limit is against accidents.
const REGEX_LIMIT: usize = 1 << 20;

/// Why a filter cannot be understood, and at which byte.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum FilterError {
    /// The syntax is wrong.
    #[error("{what} at byte {at}")]
    Syntax {
        /// What is wrong.
        what: &'static str,
        /// Where.
        at: usize,
    },
    /// A regular expression is wrong or too large.
    #[error("regular expression {expression:?} cannot be used")]
    Expression {
        /// The expression.
        expression: String,
        /// Why.
        #[source]
        source: regex::Error,
    },
}

/// Filters of which one has to match.
#[derive(Debug, Clone, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Understands all of `filters`.
    ///
    /// # Errors
    /// [`Invalid::Filter`] with the first that cannot be understood.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, ChainError> {
        let parsed = filters.iter().map(|filter| {
            let filter = filter.as_ref();
            parse(filter).map_err(|source| Invalid::Filter { filter: filter.to_owned(), source })
        });
        Ok(Self(parsed.collect::<Result<_, _>>()?))
    }

    /// True if one of the filters matches, or if there is none.
    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.matches(snapshot)))
    }
}

impl Selector {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let value = field(snapshot, &self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted.as_str()),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(expression) => expression.is_match(value.unwrap_or_default()),
        }
    }
}

fn field<'a>(snapshot: &'a Snapshot, path: &[String]) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "name" => Some(snapshot.key.as_str()),
        "parent" => Some(snapshot.parent.as_ref().map_or("", |parent| parent.as_str())),
        "kind" => Some(snapshot.kind.name()),
        "labels" => snapshot.labels.get(&rest.join(".")).map(String::as_str),
        _ => None,
    }
}

fn parse(filter: &str) -> Result<Vec<Selector>, FilterError> {
    if filter.is_empty() {
        return Ok(Vec::new());
    }
    let mut scanner = Scanner::new(filter);
    let mut selectors = vec![selector(&mut scanner)?];
    loop {
        match scanner.peek() {
            None => return Ok(selectors),
            Some(',') => {
                scanner.scan()?;
                selectors.push(selector(&mut scanner)?);
            }
            Some(_) => return Err(scanner.error("a comma is missing")),
        }
    }
}

fn selector(scanner: &mut Scanner<'_>) -> Result<Selector, FilterError> {
    let mut path = vec![path_part(scanner)?];
    while scanner.peek() == Some('.') {
        scanner.scan()?;
        path.push(path_part(scanner)?);
    }
    if matches!(scanner.peek(), None | Some(',')) {
        return Ok(Selector { path, test: Test::Present });
    }
    let Token::Operator(operator) = scanner.scan()? else {
        return Err(scanner.error("an operator (==, != or ~=) is missing"));
    };
    let test = match operator {
        "==" => Test::Equal(value(scanner, false)?),
        "!=" => Test::NotEqual(value(scanner, false)?),
        "~=" => Test::Matches(compiled(value(scanner, true)?)?),
        _ => return Err(scanner.error("there is no such operator")),
    };
    Ok(Selector { path, test })
}

fn compiled(expression: String) -> Result<Regex, FilterError> {
    let built = RegexBuilder::new(&expression).size_limit(REGEX_LIMIT).dfa_size_limit(REGEX_LIMIT).build();
    built.map_err(|source| FilterError::Expression { expression, source })
}

fn path_part(scanner: &mut Scanner<'_>) -> Result<String, FilterError> {
    match scanner.scan()? {
        Token::Field(text) => Ok(text.to_owned()),
        Token::Quoted(text) => unquoted(scanner, text, false),
        _ => Err(scanner.error("a field is missing")),
    }
}

fn value(scanner: &mut Scanner<'_>, any_quotes: bool) -> Result<String, FilterError> {
    match scanner.scan()? {
        Token::Value(text) | Token::Field(text) => Ok(text.to_owned()),
        Token::Quoted(text) => unquoted(scanner, text, any_quotes),
        _ => Err(scanner.error("a value is missing")),
    }
}

fn unquoted(scanner: &Scanner<'_>, text: &str, any_quotes: bool) -> Result<String, FilterError> {
    if !any_quotes && !text.starts_with('"') {
        return Err(scanner.error("only double quotes can stand here"));
    }
    scan::unquote(text).ok_or_else(|| scanner.error("the quoted text has a wrong escape or is no UTF-8"))
}

#[cfg(test)]
mod tests;
