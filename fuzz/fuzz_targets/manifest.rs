//! Foreign documents and names: a manifest or index, a config and a reference, divided by NUL bytes. What is understood
//! survives its own text form; what is planned obeys the order of layers.
#![no_main]

use headstart::chunked::MAX_INDEX_SIZE;
use headstart::oci::{Config, Document, ImagePlan, Platform, Prefer, Reference, Role, StackedLayer, select};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.split(|byte| *byte == 0);
    let (document, config, name) = (parts.next(), parts.next(), parts.next());
    let config = config.and_then(|bytes| Config::parse(bytes.to_vec()).ok());
    if let Some(config) = &config {
        let edited = config.with_layers(config.diff_ids(), true);
        if let Ok(edited) = edited {
            assert!(edited.has_erofs_feature());
            assert_eq!(edited.diff_ids(), config.diff_ids());
        }
    }
    match document.map(|bytes| Document::parse(bytes, None)) {
        Some(Ok(Document::Manifest(manifest))) => {
            let again = Document::parse(&manifest.to_json(), None).expect("our own text form is understood");
            assert_eq!(again, Document::Manifest(manifest.clone()));
            if let Some(config) = &config
                && let Ok(plan) = ImagePlan::new(&manifest, config)
            {
                check(&plan, manifest.layers.len());
            }
        }
        Some(Ok(Document::Index(index))) => {
            let again = Document::parse(&index.to_json(), None).expect("our own text form is understood");
            assert_eq!(again, Document::Index(index.clone()));
            for prefer in [Prefer::Erofs, Prefer::Ordinary] {
                if let Some(entry) = select(&index.manifests, &Platform::linux("amd64", None), prefer) {
                    assert!(index.manifests.contains(entry));
                }
            }
        }
        _ => {}
    }
    if let Some(Ok(text)) = name.map(std::str::from_utf8) {
        if let Ok(reference) = text.parse::<Reference>() {
            assert_eq!(reference.to_string().parse::<Reference>().as_ref(), Ok(&reference));
        }
        if let Ok(platform) = text.parse::<Platform>() {
            assert_eq!(platform.to_string().parse::<Platform>().as_ref(), Ok(&platform));
        }
    }
});

fn check(plan: &ImagePlan, layers: usize) {
    assert_eq!(plan.diff_ids.len(), layers);
    assert!(!plan.stack.is_empty() && plan.stack.last().unwrap().layer == plan.layers.len() - 1);
    let mut used = Vec::new();
    for stacked in &plan.stack {
        place(plan, stacked, &mut used);
    }
    assert_eq!(used, (0..plan.layers.len()).collect::<Vec<_>>(), "every layer has one place, in order");
    for layer in &plan.layers {
        if let Some(index) = &layer.index {
            assert!(index.section.digest.is_some() && index.range.len() <= MAX_INDEX_SIZE);
            assert!(index.blob != layer.blob || index.range.end() <= layer.blob_size);
            assert!(index.section.data_end <= layer.blob_size);
        }
    }
}

/// Data layers come before the layer that uses them, devices right before theirs.
fn place(plan: &ImagePlan, stacked: &StackedLayer, used: &mut Vec<usize>) {
    for data in &stacked.data {
        assert_eq!(plan.layers[data.layer].role, Some(Role::OverlayData));
        assert!(data.data.is_empty());
        place(plan, data, used);
    }
    for device in &stacked.devices {
        assert_eq!(plan.layers[*device].role, Some(Role::Device));
        used.push(*device);
    }
    used.push(stacked.layer);
}
