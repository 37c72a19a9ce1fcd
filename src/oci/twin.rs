//! Twins: an index that holds an ordinary image and the same image in EROFS layers, layer for layer.
//!
//! The entry of the EROFS image names the manifest of its twin in the annotation [`TWIN_OF`]. That is the publisher's
//! word, and the index is as good as the name it was fetched under. What can be checked is checked: both stand in one
//! index, one entry alone names the other, and the configs say the same about everything but the layers
//! ([`Config::corresponds`](super::Config::corresponds)).

use super::descriptor::Descriptor;
use super::manifest::Index;
use super::media;
use crate::model::BlobDigest;

/// Annotation of an index entry: the manifest of the ordinary image that this one is a conversion of.
pub const TWIN_OF: &str = "io.github.headstart-fs.twin-of";

/// The entry of the EROFS twin of `ordinary`; none if the index lacks one of the two, or if there is any doubt.
pub fn find_twin<'a>(index: &'a Index, ordinary: &BlobDigest) -> Option<&'a Descriptor> {
    let manifests = || index.manifests.iter().filter(|entry| media::is_manifest(&entry.media_type));
    manifests().find(|entry| entry.digest == *ordinary)?;
    let names_it = |entry: &&Descriptor| {
        let named = entry.annotations.get(TWIN_OF).and_then(|digest| digest.parse::<BlobDigest>().ok());
        named == Some(*ordinary)
    };
    let mut twins = manifests().filter(names_it);
    match (twins.next(), twins.next()) {
        (Some(twin), None) if twin.digest != *ordinary => Some(twin),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(content: &str, twin_of: Option<&str>) -> Descriptor {
        let mut descriptor = Descriptor::of(media::OCI_MANIFEST, content.as_bytes());
        descriptor.annotations.extend(twin_of.map(|of| (TWIN_OF.to_owned(), of.to_owned())));
        descriptor
    }

    #[test]
    fn a_twin_is_the_one_entry_that_names_the_other() {
        let ordinary = manifest("ordinary", None);
        let name = ordinary.digest.to_string();
        let other = manifest("other", None).digest.to_string();
        let twin = manifest("twin", Some(&name));
        let itself = manifest("ordinary", Some(&name));
        let blob = Descriptor { media_type: "application/vnd.example".to_owned(), ..twin.clone() };
        for (case, entries, found) in [
            ("both", vec![ordinary.clone(), twin.clone()], true),
            ("the other way round", vec![twin.clone(), ordinary.clone()], true),
            (
                "among others",
                vec![manifest("x", None), ordinary.clone(), twin.clone(), manifest("y", Some(&other))],
                true,
            ),
            ("no ordinary one", vec![twin.clone()], false),
            ("no twin", vec![ordinary.clone(), manifest("x", None)], false),
            ("of another", vec![ordinary.clone(), manifest("x", Some(&other))], false),
            ("two that claim it", vec![ordinary.clone(), twin.clone(), manifest("x", Some(&name))], false),
            ("no digest", vec![ordinary.clone(), manifest("x", Some("../x"))], false),
            ("its own twin", vec![itself], false),
            ("no manifest", vec![ordinary.clone(), blob], false),
        ] {
            let index = Index::new(entries);
            let expected = found.then_some(twin.digest);
            assert_eq!(find_twin(&index, &ordinary.digest).map(|twin| twin.digest), expected, "{case}");
        }
    }
}
