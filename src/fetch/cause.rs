//! Why bytes are wanted, which is also how urgently.

/// Why bytes are wanted. The order is the order of urgency: the least is served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// Somebody reads them now.
    Read,
    /// They hold metadata: somebody will look up names soon.
    Metadata,
    /// A recorded start-up read them.
    Replay,
    /// A reader moves towards them.
    ReadAhead,
    /// The layer is being completed in the background.
    Fill,
}

impl Cause {
    /// True if somebody waits.
    pub const fn is_demand(self) -> bool {
        matches!(self, Self::Read | Self::Metadata)
    }

    /// A name for spans.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Metadata => "metadata",
            Self::Replay => "replay",
            Self::ReadAhead => "read_ahead",
            Self::Fill => "fill",
        }
    }
}
