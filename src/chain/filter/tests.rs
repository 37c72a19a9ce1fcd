//! The language, held against what containerd's own parser answers.

use super::*;
use crate::chain::{Content, Key, Kind, Owner, SnapshotSlot};
use crate::model::Timestamp;

fn snapshot(name: &str, kind: Kind, parent: &str, labels: &[(&str, &str)]) -> Snapshot {
    let now = Timestamp::default();
    Snapshot {
        key: Key::new(name).unwrap(),
        slot: SnapshotSlot(1),
        kind,
        parent: Key::optional(parent).unwrap(),
        labels: labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        created: now,
        updated: now,
        content: Content::Files,
        owner: Owner::Client,
        usage: None,
        filling: None,
    }
}

fn corpus() -> Vec<Snapshot> {
    vec![
        snapshot("foo", Kind::Active, "", &[("foo", "true")]),
        snapshot("bar", Kind::View, "foo", &[]),
        snapshot("foo2", Kind::Active, "", &[("foo", "present"), ("more complex label", "present")]),
        snapshot("bar2", Kind::Committed, "foo", &[("bar", "true")]),
        snapshot("fooer", Kind::Active, "", &[("more complex label with \\ and \"", "present")]),
        snapshot("fooest", Kind::Active, "", &[("more complex label with \\ and \".post", "present")]),
        snapshot("too complex, yo", Kind::Active, "", &[]),
        snapshot("compound", Kind::Active, "", &[("foo", "omg_asdf.asdf-qwer")]),
        snapshot(
            "k8s.io/7/sha256:ab cd",
            Kind::Committed,
            "default/1/x",
            &[("containerd.io/snapshot.ref", "sha256:ab")],
        ),
    ]
}

#[test]
fn filters_match_as_containerds_do() {
    let everything = (0..corpus().len()).collect::<Vec<_>>();
    let cases: [(&[&str], &[usize]); 36] = [
        (&[], &everything),
        (&[""], &everything),
        (&["name"], &everything),
        (&["parent"], &everything),
        (&["labels"], &[]),
        (&["size"], &[]),
        (&["labels.foo"], &[0, 2, 7]),
        (&["labels.foo,name"], &[0, 2, 7]),
        (&["labels.foo , name"], &[]),
        (&["labels.foo==true"], &[0]),
        (&["labels.foo==omg_asdf.asdf-qwer"], &[7]),
        (&["labels.foo!=true"], &[1, 2, 3, 4, 5, 6, 7, 8]),
        (&["labels.foo!=\"\""], &[0, 2, 7]),
        (&["name==bar"], &[1]),
        (&["name == bar"], &[1]),
        (&["name==bar,labels.bar"], &[]),
        (&["name==bar2,labels.bar==true"], &[3]),
        (&["name==bar2,labels.bar==wrong"], &[]),
        (&["name==\"too complex, yo\""], &[6]),
        (&["name==\"\\x74oo\\040complex\\u002c \\U00000079o\""], &[6]),
        (&["name~=^ba"], &[1, 3]),
        (&["name~=/^fo{2}$/"], &[0]),
        (&["name~=|^fo{2,3}$|"], &[0]),
        (&["name~=\"^too complex, \""], &[6]),
        (&["name~=/[abc]{0,1}\"\\//,name!=foo"], &[]),
        (&["labels.foo~=^$"], &[1, 3, 4, 5, 6, 8]),
        (&["name==foo2,labels.\"more complex label\""], &[2]),
        (&["labels.\"more complex label with \\\\ and \\\"\"==present"], &[4]),
        (&["labels.\"more complex label with \\\\ and \\\"\".post==present"], &[5]),
        (&["name==foo", "name==bar2"], &[0, 3]),
        (&["name==foo", "name==foo,labels.nothing"], &[0]),
        (&["kind==view"], &[1]),
        (&["kind==committed,parent!=\"\""], &[3, 8]),
        (&["kind==Committed"], &[]),
        (&["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"default/1/x\""], &[8]),
        (&["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\""], &[]),
    ];
    for (filters, wanted) in cases {
        let parsed = Filters::parse(filters);
        if filters == ["labels.foo , name"] {
            assert!(parsed.is_err(), "white space before a comma was taken");
            continue;
        }
        let parsed = parsed.unwrap_or_else(|error| panic!("{filters:?}: {error:?}"));
        let found: Vec<usize> =
            corpus().iter().enumerate().filter(|(_, item)| parsed.matches(item)).map(|(at, _)| at).collect();
        assert_eq!(found, wanted, "{filters:?}");
    }
}

#[test]
fn what_is_no_filter_is_refused_where_it_is_wrong() {
    for (filter, at) in [
        ("labels.|foo|==x", 7),
        ("labels.?\"foo\".post==present", 7),
        ("name==foo,", 10),
        ("labels.", 7),
        ("image~=,id?=?fbaq", 7),
        ("labels.ns/key==value", 9),
        ("labels.key==/value", 12),
        ("name=foo", 4),
        ("name===foo", 4),
        ("name foo", 5),
        ("name==", 6),
        (",name", 0),
        ("name==\"\\q\"", 6),
        ("name==\"\\xff\"", 6),
        ("name==\"a\nb\"", 6),
        ("\"unfinished", 0),
        ("é", 0),
    ] {
        match Filters::parse(&[filter]) {
            Err(ChainError::InvalidArgument(Invalid::Filter {
                filter: said,
                source: FilterError::Syntax { at: found, .. },
            })) => assert_eq!((said.as_str(), found), (filter, at)),
            other => panic!("{filter:?}: {other:?}"),
        }
    }
    for filter in ["name~=[", "name~=(a{1000}){1000}"] {
        assert!(
            matches!(
                Filters::parse(&["name", filter]),
                Err(ChainError::InvalidArgument(Invalid::Filter { source: FilterError::Expression { .. }, .. }))
            ),
            "{filter:?}"
        );
    }
}

proptest::proptest! {
    #[test]
    fn no_text_is_too_strange(text in r#"([a-z."',=!~/|\\ é\u{0}\n]|labels|==|~=){0,24}"#) {
        if let Ok(filters) = Filters::parse(&[text]) {
            for item in corpus() {
                std::hint::black_box(filters.matches(&item));
            }
        }
    }

    #[test]
    fn quoted_values_mean_themselves(value in "\\PC{0,20}") {
        let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
        let filters = Filters::parse(&[format!("labels.x==\"{quoted}\"")]).unwrap();
        let labelled = snapshot("a", Kind::View, "", &[("x", &value)]);
        proptest::prop_assert!(filters.matches(&labelled));
        let other = snapshot("a", Kind::View, "", &[("x", &format!("{value}x"))]);
        proptest::prop_assert!(!filters.matches(&other));
    }
}
