//! The tables of the file: what is in which, and how a value is written.

use redb::{
    Database, ReadTransaction, ReadableTable as _, ReadableTableMetadata as _, TableDefinition, TableHandle as _,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::chain::{Chain, Cursors, Damage, Write};

const HEADER: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("header");
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const LAYERS: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("layers");
const IMAGES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("images");
const CURSORS: TableDefinition<'_, &str, u32> = TableDefinition::new("cursors");

const MAGIC: &[u8] = b"HSSNAPS\0";
const VERSION: u32 = 1;
/// Features that whoever reads has to know. None is defined.
const KNOWN_INCOMPATIBLE: u64 = 0;

/// Why a file does not become a state.
pub(super) enum LoadError {
    Database(redb::Error),
    Unsupported(String),
    Damaged(String),
    Contradiction(Damage),
}

impl<E: Into<redb::Error>> From<E> for LoadError {
    fn from(error: E) -> Self {
        Self::Database(error.into())
    }
}

/// Writes the header and makes the tables.
pub(super) fn prepare(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut header = transaction.open_table(HEADER)?;
        header.insert("magic", MAGIC)?;
        header.insert("version", VERSION.to_le_bytes().as_slice())?;
        header.insert("compatible", 0_u64.to_le_bytes().as_slice())?;
        header.insert("incompatible", 0_u64.to_le_bytes().as_slice())?;
        transaction.open_table(SNAPSHOTS)?;
        transaction.open_table(LAYERS)?;
        transaction.open_table(IMAGES)?;
        transaction.open_table(CURSORS)?;
    }
    transaction.commit()?;
    Ok(())
}

/// Writes `writes`, all or nothing, to last.
pub(super) fn write(database: &Database, writes: &[Write]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut snapshots = transaction.open_table(SNAPSHOTS)?;
        let mut layers = transaction.open_table(LAYERS)?;
        let mut images = transaction.open_table(IMAGES)?;
        let mut cursors = transaction.open_table(CURSORS)?;
        for write in writes {
            match write {
                Write::PutSnapshot(snapshot) => drop(snapshots.insert(snapshot.key.as_str(), &*json(snapshot))?),
                Write::DropSnapshot(key) => drop(snapshots.remove(key.as_str())?),
                Write::PutLayer(layer) => drop(layers.insert(layer.slot.0, &*json(layer))?),
                Write::DropLayer(slot) => drop(layers.remove(slot.0)?),
                Write::PutImage(image) => drop(images.insert(image.name.as_str(), &*json(image))?),
                Write::DropImage(name) => drop(images.remove(name.as_str())?),
                Write::Cursors(Cursors { snapshot, layer }) => {
                    cursors.insert("snapshot", snapshot)?;
                    cursors.insert("layer", layer)?;
                }
            }
        }
    }
    transaction.commit()?;
    Ok(())
}

fn json(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("plain fields always have a JSON form")
}

/// What the file says.
pub(super) fn load(transaction: &ReadTransaction) -> Result<Chain, LoadError> {
    let known = [HEADER.name(), SNAPSHOTS.name(), LAYERS.name(), IMAGES.name(), CURSORS.name()];
    let present: Vec<String> = transaction.list_tables()?.map(|table| table.name().to_owned()).collect();
    if !present.iter().any(|name| name == HEADER.name()) {
        return Err(LoadError::Damaged("it holds no records of snapshots".to_owned()));
    }
    check_header(&transaction.open_table(HEADER)?)?;
    if let Some(missing) = known.iter().find(|known| !present.iter().any(|name| name == *known)) {
        return Err(LoadError::Damaged(format!("table {missing} is missing")));
    }
    let mut snapshots = Vec::new();
    for entry in transaction.open_table(SNAPSHOTS)?.iter()? {
        let (key, value) = entry?;
        snapshots
            .push(value_of(key.value(), value.value(), |of: &crate::chain::Snapshot| of.key.as_str() == key.value())?);
    }
    let mut layers = Vec::new();
    for entry in transaction.open_table(LAYERS)?.iter()? {
        let (slot, value) = entry?;
        let of = format!("layer {}", slot.value());
        layers.push(value_of(&of, value.value(), |of: &crate::chain::Layer| of.slot.0 == slot.value())?);
    }
    let mut images = Vec::new();
    for entry in transaction.open_table(IMAGES)?.iter()? {
        let (name, value) = entry?;
        images.push(value_of(name.value(), value.value(), |of: &crate::chain::Image| of.name == name.value())?);
    }
    let cursors = transaction.open_table(CURSORS)?;
    let cursor = |name| Ok::<_, LoadError>(cursors.get(name)?.map_or(0, |value| value.value()));
    let cursors = Cursors { snapshot: cursor("snapshot")?, layer: cursor("layer")? };
    Chain::restore(snapshots, layers, images, cursors).map_err(LoadError::Contradiction)
}

fn value_of<T: DeserializeOwned>(of: &str, value: &[u8], belongs: impl Fn(&T) -> bool) -> Result<T, LoadError> {
    let damaged = |what: String| LoadError::Damaged(format!("the record of {of:?} {what}"));
    let value = serde_json::from_slice(value).map_err(|error| damaged(format!("cannot be read: {error}")))?;
    if !belongs(&value) {
        return Err(damaged("is that of another".to_owned()));
    }
    Ok(value)
}

fn check_header(header: &redb::ReadOnlyTable<&'static str, &'static [u8]>) -> Result<(), LoadError> {
    let missing = |name: &str| LoadError::Damaged(format!("its header has no {name}"));
    let bytes = |name: &str| -> Result<Vec<u8>, LoadError> {
        Ok(header.get(name)?.ok_or_else(|| missing(name))?.value().to_vec())
    };
    if header.is_empty()? || bytes("magic")? != MAGIC {
        return Err(missing("magic"));
    }
    let version = bytes("version")?.try_into().map(u32::from_le_bytes).map_err(|_| missing("version"))?;
    if version != VERSION {
        return Err(LoadError::Unsupported(format!("version {version}")));
    }
    let features = bytes("incompatible")?.try_into().map(u64::from_le_bytes).map_err(|_| missing("incompatible"))?;
    let unknown = features & !KNOWN_INCOMPATIBLE;
    if unknown != 0 {
        return Err(LoadError::Unsupported(format!("features {unknown:#x}")));
    }
    Ok(())
}
