//! Who vouches for what labels say.
//!
//! Labels may come from whoever made the image (see `oci::labels`). containerd notes with each blob from which host and
//! repository it got it: a manifest that it has not got from the repository that the labels name is none that it is
//! pulling, and the name is not followed. Where all users of a containerd have its annotations switched on, so that it
//! overwrites whatever an image says, its word may be dispensed with.

use super::decide::Why;
use super::image::Pulled;
use crate::grpc::{Containerd, ContainerdError};
use crate::model::BlobDigest;

/// Who vouches for what labels say.
#[derive(Debug, Clone)]
pub(crate) enum Witness {
    /// containerd, which is asked.
    Containerd(Containerd),
    /// Nobody: labels are believed.
    Labels,
}

impl Witness {
    /// Whether the image was really pulled from where the labels say.
    pub(super) async fn vouches(&self, pulled: &Pulled) -> Result<(), Why> {
        let Self::Containerd(containerd) = self else { return Ok(()) };
        let (host, repository) = (pulled.image.host(), pulled.image.repository());
        let known = containerd.content(&pulled.namespace, pulled.manifest).await.map_err(Why::NoWitness)?;
        match known {
            Some(known) if known.is_from(host, repository) => Ok(()),
            _ => Err(Why::Stranger { manifest: pulled.manifest, repository: format!("{host}/{repository}") }),
        }
    }

    /// A document that has been fetched already.
    pub(super) async fn document(
        &self,
        namespace: &str,
        digest: BlobDigest,
    ) -> Result<Option<Vec<u8>>, ContainerdError> {
        match self {
            Self::Containerd(containerd) => containerd.document(namespace, digest).await,
            Self::Labels => Ok(None),
        }
    }

    /// The indexes that name the image and came from its repository; none if nobody can tell.
    pub(super) async fn indexes(&self, pulled: &Pulled) -> Result<Option<Vec<Vec<u8>>>, ContainerdError> {
        let Self::Containerd(containerd) = self else { return Ok(None) };
        let (host, repository) = (pulled.image.host(), pulled.image.repository());
        let mut documents = Vec::new();
        for index in containerd.indexes_of(&pulled.namespace, pulled.manifest).await? {
            if index.is_from(host, repository) {
                documents.extend(containerd.document(&pulled.namespace, index.digest).await?);
            }
        }
        Ok(Some(documents))
    }
}
