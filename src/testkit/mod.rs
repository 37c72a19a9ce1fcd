//! What the tests of several rooms share: generators, faulty peers, judges.

pub mod abuse;
pub mod containerd;
pub mod images;
pub mod layers;
pub mod layouts;
pub mod lazy;
pub mod registry;
pub mod source;
pub mod tar;
pub mod tree;
pub mod waiting;
