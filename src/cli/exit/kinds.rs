//! Which error of which room is which kind of failure: the table.

use std::io;
use std::sync::Arc;

use super::{Problem, Told};
use crate::chain::{ChainError, Damage};
use crate::chunked::{AssembleError, SequentialError};
use crate::control::ControlError;
use crate::convert::ImageError;
use crate::convert::below::ViewError;
use crate::convert::layer::LayerError;
use crate::daemon::browse::BrowseError;
use crate::daemon::config::ConfigError;
use crate::daemon::host::{Closed, NeverLocal, NoSuchMount};
use crate::daemon::image::UnsupportedData;
use crate::daemon::ledger::LedgerError;
use crate::daemon::mounts::MountsError;
use crate::daemon::place::PlaceError;
use crate::drivers::{DriverError, UnknownDriver};
use crate::erofs;
use crate::erofs::writer::TreeError;
use crate::fetch::FetchError;
use crate::fuse;
use crate::grpc;
use crate::layout::LayoutError;
use crate::model::SourceError;
use crate::oci::{DocumentError, PlanError, PlatformError, ReferenceError};
use crate::overlay;
use crate::registry::{Attempts, HostsError, RegistryError, TryError};
use crate::serve::ServeError;
use crate::snapshots::SnapshotsError;
use crate::store::StoreError;
use crate::store::records::RecordsError;
use crate::sys::loopdev::LoopError;
use crate::sys::mount::MountError;
use crate::tar::TarError;
use crate::tar::decompress::DecompressError;
use crate::transport::TransportError;
use crate::unpack::UnpackError;
use crate::vfs;

/// The kind of one error of a chain, if it decides; else its causes do.
pub(super) fn known(error: &(dyn std::error::Error + 'static)) -> Option<Problem> {
    macro_rules! first_of {
        ($($kind:ty => $judge:expr),+ $(,)?) => {
            $(if let Some(error) = error.downcast_ref::<$kind>() { return $judge(error); })+
        };
    }
    first_of! {
        Told => |told: &Told| Some(told.problem),
        ConfigError => of_config,
        ReferenceError => |_: &ReferenceError| Some(Problem::Usage),
        PlatformError => |_: &PlatformError| Some(Problem::Usage),
        DocumentError => of_document,
        PlanError => |_: &PlanError| Some(Problem::Unsupported),
        RegistryError => of_registry,
        TryError => |error: &TryError| Some(of_try(error)),
        HostsError => of_hosts,
        TransportError => of_transport,
        SourceError => of_source,
        SequentialError => of_sequential,
        FetchError => of_fetch,
        Arc<FetchError> => |error: &Arc<FetchError>| of_fetch(error),
        UnpackError => of_unpack,
        NeverLocal => of_never_local,
        erofs::Error => of_erofs,
        overlay::Error<erofs::Error> => |error: &overlay::Error<erofs::Error>| of_overlay(error, of_erofs),
        overlay::Error<ViewError> => |error: &overlay::Error<ViewError>| of_overlay(error, of_view),
        vfs::Error => of_vfs,
        vfs::OpenError => of_open,
        // What a mount waits for is known to it as an error and no more.
        vfs::BringError => |error: &vfs::BringError| known(&**error),
        fuse::ServeError => of_fuse,
        fuse::LinkError => of_link,
        ImageError => of_conversion,
        LayerError => of_layer,
        TreeError => |_: &TreeError| Some(Problem::Unsupported),
        DecompressError => of_decompress,
        AssembleError => of_assemble,
        MountError => |error: &MountError| Some(of_mount(error)),
        MountsError => of_mounts,
        LoopError => |error: &LoopError| Some(of_loop(error)),
        DriverError => of_driver,
        UnknownDriver => |_: &UnknownDriver| Some(Problem::Usage),
        BrowseError => of_browse,
        vfs::ForestError => of_forest,
        Closed => |_: &Closed| Some(Problem::Unreachable),
        PlaceError => of_place,
        NoSuchMount => |_: &NoSuchMount| Some(Problem::NotFound),
        UnsupportedData => |_: &UnsupportedData| Some(Problem::Unsupported),
        LayoutError => of_layout,
        StoreError => of_store,
        ChainError => of_chain,
        Damage => |_: &Damage| Some(Problem::Corrupt),
        RecordsError => of_records,
        SnapshotsError => of_snapshots,
        LedgerError => of_ledger,
        TarError => of_tar,
        ServeError => of_serve,
        grpc::ServeError => of_containerds_socket,
        ControlError => of_control,
        io::Error => of_io_or_inside,
    }
    None
}

fn of_config(error: &ConfigError) -> Option<Problem> {
    match error {
        ConfigError::Read { .. } => None,
        ConfigError::Parse { .. } | ConfigError::UnknownKey { .. } | ConfigError::Value { .. } => Some(Problem::Usage),
    }
}

fn of_document(error: &DocumentError) -> Option<Problem> {
    Some(match error {
        DocumentError::TooLarge { .. } | DocumentError::Schema1 | DocumentError::NoImage(_) => Problem::Unsupported,
        DocumentError::MediaType(_) | DocumentError::SchemaVersion(_) => Problem::Unsupported,
        DocumentError::Size { .. }
        | DocumentError::Digest { .. }
        | DocumentError::Json { .. }
        | DocumentError::Contradiction { .. }
        | DocumentError::Ambiguous
        | DocumentError::LayerCount { .. } => Problem::Corrupt,
    })
}

fn of_never_local(error: &NeverLocal) -> Option<Problem> {
    match error {
        NeverLocal::NotFilled(_) => Some(Problem::Unsupported),
        NeverLocal::Failed(_, error) => of_unpack(error),
    }
}

fn of_unpack(error: &UnpackError) -> Option<Problem> {
    match error {
        UnpackError::Fetch { source, .. } => of_fetch(source),
        UnpackError::Read { source, .. } => of_io_or_inside(source),
        UnpackError::Tar { source, .. } => of_layer(source),
        UnpackError::Store { source, .. } => of_store(source),
        UnpackError::Contradiction { .. } | UnpackError::DiffId { .. } | UnpackError::Misplaced { .. } => {
            Some(Problem::Corrupt)
        }
        UnpackError::Unverifiable { .. } => Some(Problem::Unsupported),
        UnpackError::Full { .. } => Some(Problem::Local),
        UnpackError::Abandoned { .. } => Some(Problem::Internal),
    }
}

fn of_registry(error: &RegistryError) -> Option<Problem> {
    match error {
        RegistryError::Failed { attempts, .. } => Some(of_attempts(attempts)),
        RegistryError::NotFound { .. } => Some(Problem::NotFound),
        RegistryError::NoServer { .. } => Some(Problem::Usage),
        RegistryError::Hosts(error) => of_hosts(error),
        RegistryError::Document(error) => of_document(error),
    }
}

/// The last server is the registry itself; what it said counts before what its mirrors said.
fn of_attempts(attempts: &Attempts) -> Problem {
    attempts.iter().last().map_or(Problem::Unreachable, |attempt| of_try(&attempt.error))
}

fn of_try(error: &TryError) -> Problem {
    match error {
        TryError::Connect(_)
        | TryError::Tls(_)
        | TryError::Broken(_)
        | TryError::Timeout { .. }
        | TryError::Cut { .. }
        | TryError::Trickle { .. }
        | TryError::Redirect(_)
        | TryError::Header(_)
        | TryError::Range { .. } => Problem::Unreachable,
        TryError::Status { status: 401 | 403, .. } | TryError::Denied(_) | TryError::Credentials(_) => Problem::Denied,
        TryError::Status { status: 404 | 410, .. } => Problem::NotFound,
        TryError::Status { .. } => Problem::Unreachable,
        TryError::Token { source, .. } => of_try(source),
        TryError::TooLarge(_) | TryError::Document(_) | TryError::Json { .. } => Problem::Corrupt,
        TryError::Setup(error) => of_hosts(error).unwrap_or(Problem::Local),
        TryError::File(error) => of_io(error),
    }
}

fn of_hosts(error: &HostsError) -> Option<Problem> {
    match error {
        HostsError::Read { .. } => None,
        HostsError::Parse { .. } | HostsError::Value { .. } | HostsError::Certificate { .. } => Some(Problem::Usage),
    }
}

fn of_transport(error: &TransportError) -> Option<Problem> {
    match error {
        TransportError::Registry(error) => of_registry(error),
        TransportError::Layout(error) => of_layout(error),
        TransportError::Document { source, .. } => of_document(source),
        // The cause of a stream's end stands behind it in the chain.
        TransportError::Source(_) => None,
        TransportError::NoPlatform { .. } => Some(Problem::NotFound),
        TransportError::TooManyIndexes { .. } => Some(Problem::Unsupported),
        TransportError::Unwritable { .. } => Some(Problem::Usage),
        TransportError::Damaged { .. } => Some(Problem::Corrupt),
        TransportError::Spool { source, .. } => Some(of_io(source)),
    }
}

fn of_layout(error: &LayoutError) -> Option<Problem> {
    match error {
        LayoutError::Io(error) => Some(of_io(&error.source)),
        LayoutError::NoLayout { .. } | LayoutError::Ambiguous { .. } => Some(Problem::Usage),
        LayoutError::Archive { .. } | LayoutError::Size { .. } => Some(Problem::Corrupt),
        LayoutError::Document { source, .. } => of_document(source),
        LayoutError::NoImage { .. } | LayoutError::NoBlob { .. } => Some(Problem::NotFound),
    }
}

fn of_store(error: &StoreError) -> Option<Problem> {
    match error {
        StoreError::Io { .. } => None,
        StoreError::Full { .. } | StoreError::DamagedInUse { .. } => Some(Problem::Local),
        StoreError::Unsupported { .. } => Some(Problem::Unsupported),
        StoreError::OutOfBounds { .. } => Some(Problem::Internal),
    }
}

fn of_chain(error: &ChainError) -> Option<Problem> {
    Some(match error {
        ChainError::NotFound { .. } => Problem::NotFound,
        ChainError::AlreadyExists { .. } | ChainError::FailedPrecondition { .. } | ChainError::InvalidArgument(_) => {
            Problem::Usage
        }
    })
}

fn of_records(error: &RecordsError) -> Option<Problem> {
    match error {
        RecordsError::Refused(error) => of_chain(error),
        RecordsError::InUse { .. } | RecordsError::Unclean { .. } | RecordsError::Database { .. } => {
            Some(Problem::Local)
        }
        RecordsError::Unsupported { .. } => Some(Problem::Unsupported),
        RecordsError::Damaged { .. } | RecordsError::Contradiction { .. } => Some(Problem::Corrupt),
        RecordsError::Store(error) => of_store(error),
    }
}

fn of_snapshots(error: &SnapshotsError) -> Option<Problem> {
    match error {
        SnapshotsError::Records(error) => of_records(error),
        SnapshotsError::Store(error) => of_store(error),
    }
}

fn of_ledger(error: &LedgerError) -> Option<Problem> {
    match error {
        LedgerError::Records(error) => of_records(error),
        LedgerError::Snapshots(error) => of_snapshots(error),
        LedgerError::Store(error) => of_store(error),
    }
}

fn of_tar(error: &TarError) -> Option<Problem> {
    use crate::tar::Problem as Tar;
    match &error.problem {
        Tar::Io(_) => None,
        Tar::OutOfRange { .. }
        | Tar::RecordsTooLong { .. }
        | Tar::TooLong { .. }
        | Tar::UnknownType(_)
        | Tar::TooManyRuns(_)
        | Tar::SparseVersion { .. } => Some(Problem::Unsupported),
        Tar::Cut(_)
        | Tar::Checksum { .. }
        | Tar::NotANumber { .. }
        | Tar::BadRecord(_)
        | Tar::BadPath(_)
        | Tar::Climbs
        | Tar::BadTarget { .. }
        | Tar::TargetClimbs(_)
        | Tar::Nul(_)
        | Tar::NoTarget
        | Tar::RootIsNoDirectory(_)
        | Tar::ReservedName
        | Tar::BadXattr { .. }
        | Tar::BadAcl(_)
        | Tar::BadSparseMap(_)
        | Tar::LoneZeroBlock => Some(Problem::Corrupt),
    }
}

fn of_serve(error: &ServeError) -> Option<Problem> {
    match error {
        ServeError::NotALayout { source, .. } => Some(match of_io(source) {
            Problem::Local => Problem::Corrupt,
            other => other,
        }),
        ServeError::Listen { .. } => Some(Problem::Usage),
        ServeError::AccessLog { .. } | ServeError::Serve { .. } => None,
    }
}

fn of_containerds_socket(error: &grpc::ServeError) -> Option<Problem> {
    match error {
        grpc::ServeError::Bind { source, .. } | grpc::ServeError::Adopt(source) => of_io_or_inside(source),
        grpc::ServeError::Ended(_) => None,
    }
}

fn of_control(error: &ControlError) -> Option<Problem> {
    match error {
        ControlError::Gone { .. } | ControlError::NoAnswer { .. } | ControlError::Ended { .. } => {
            Some(Problem::Unreachable)
        }
        ControlError::Unreachable { .. } => None,
        ControlError::Nonsense { .. } => Some(Problem::Unsupported),
        ControlError::Refused(fault) => Some(Problem::named(&fault.kind).unwrap_or(Problem::Internal)),
    }
}

fn of_source(error: &SourceError) -> Option<Problem> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*error.source);
    while let Some(error) = cause {
        if let Some(problem) = known(error) {
            return Some(problem);
        }
        cause = error.source();
    }
    Some(if error.transient { Problem::Unreachable } else { Problem::NotFound })
}

fn of_sequential(error: &SequentialError) -> Option<Problem> {
    match error {
        SequentialError::Read { .. } | SequentialError::Write { .. } => None,
        SequentialError::Inflate { .. } | SequentialError::Truncated(_) => Some(Problem::Corrupt),
        SequentialError::TooLarge(_) => Some(Problem::Unsupported),
    }
}

fn of_fetch(error: &FetchError) -> Option<Problem> {
    match error {
        FetchError::Source { source, .. }
        | FetchError::IndexSource { source, .. }
        | FetchError::WholeSource { source, .. } => of_source(source),
        FetchError::Interrupted { .. } | FetchError::Deadline { .. } => Some(Problem::Unreachable),
        FetchError::Corrupt { .. }
        | FetchError::Index { .. }
        | FetchError::BlobDigest { .. }
        | FetchError::DiffId { .. } => Some(Problem::Corrupt),
        FetchError::Unpack { source, .. } => of_sequential(source),
        FetchError::Store { source, .. } | FetchError::Verify { source, .. } => of_store(source),
        FetchError::NoRoom { .. } => Some(Problem::Local),
        FetchError::Abandoned { .. } => Some(Problem::Internal),
    }
}

fn of_conversion(error: &ImageError) -> Option<Problem> {
    match error {
        ImageError::Transport(error) => of_transport(error),
        // What is behind these stands behind them in the chain.
        ImageError::Fetch { .. } | ImageError::Read { .. } | ImageError::Layer { .. } | ImageError::Keep { .. } => None,
        ImageError::DiffId { .. } | ImageError::NoDiffId { .. } => Some(Problem::Corrupt),
        ImageError::UnknownLayer { .. } | ImageError::NotLinux(_) => Some(Problem::Unsupported),
        ImageError::Config(error) => of_document(error),
        ImageError::WouldLose { .. } => Some(Problem::Usage),
        ImageError::NoImage { .. } => Some(Problem::NotFound),
        ImageError::Threads(_) => Some(Problem::Local),
        ImageError::Stopped => Some(Problem::Internal),
    }
}

fn of_layer(error: &LayerError) -> Option<Problem> {
    match error {
        LayerError::Tar(_) | LayerError::Tree(_) | LayerError::Lower { .. } | LayerError::Write(_) => None,
        LayerError::NeedsLower(_) | LayerError::TooManyLinks(_) | LayerError::Range(_) => Some(Problem::Unsupported),
        LayerError::Spool { source, .. } | LayerError::Image { source } => Some(of_io(source)),
        LayerError::Damaged { .. } => Some(Problem::Local),
    }
}

/// A stream that cannot be inflated is damaged, unless what it is read from failed.
fn of_decompress(error: &DecompressError) -> Option<Problem> {
    let inside = error.source.get_ref().and_then(|inside| known(inside));
    Some(match inside {
        Some(problem) => problem,
        None if error.source.raw_os_error().is_some() => of_io(&error.source),
        None => Problem::Corrupt,
    })
}

fn of_assemble(error: &AssembleError) -> Option<Problem> {
    match error {
        AssembleError::Write { .. } => None,
        AssembleError::TooManyChunks | AssembleError::ChunkSize { .. } => Some(Problem::Unsupported),
    }
}

fn of_erofs(error: &erofs::Error) -> Option<Problem> {
    Some(match error {
        // Whoever reads brings what is absent; nobody is told of it.
        erofs::Error::Absent { .. } => Problem::Internal,
        erofs::Error::Io { .. } => Problem::Local,
        erofs::Error::Features { .. } | erofs::Error::Compressed { .. } => Problem::Unsupported,
        erofs::Error::NotErofs { .. }
        | erofs::Error::TooShort { .. }
        | erofs::Error::DeviceCount { .. }
        | erofs::Error::DeviceMissing { .. }
        | erofs::Error::WrongKind { .. }
        | erofs::Error::Corrupt { .. } => Problem::Corrupt,
    })
}

fn of_view(error: &ViewError) -> Option<Problem> {
    match error {
        ViewError::Image(error) => of_erofs(error),
        ViewError::Files(error) => of_io_or_inside(&error.source),
    }
}

fn of_overlay<E: std::error::Error>(
    error: &overlay::Error<E>,
    of_layer: impl Fn(&E) -> Option<Problem>,
) -> Option<Problem> {
    match error {
        overlay::Error::Layer { source, .. } => of_layer(source),
        overlay::Error::Metacopy { .. } | overlay::Error::TooLarge { .. } | overlay::Error::LayerCount(_) => {
            Some(Problem::Unsupported)
        }
        overlay::Error::Redirect { .. } | overlay::Error::Dots { .. } | overlay::Error::Detached { .. } => {
            Some(Problem::Corrupt)
        }
        overlay::Error::NoLayer(_) => Some(Problem::Internal),
    }
}

fn of_vfs(error: &vfs::Error) -> Option<Problem> {
    match error {
        vfs::Error::Layer { source, .. } => of_erofs(source),
        vfs::Error::Refused(error) => of_overlay(error, of_erofs),
        vfs::Error::LayerCount(_) | vfs::Error::NumberTooLarge { .. } => Some(Problem::Unsupported),
        vfs::Error::Image { .. } => Some(Problem::Local),
        vfs::Error::IsADirectory(_)
        | vfs::Error::NotADirectory(_)
        | vfs::Error::NotALink(_)
        | vfs::Error::NotRegular(_) => Some(Problem::NotFound),
        vfs::Error::Absent { .. } | vfs::Error::NoSuchInode(_) => Some(Problem::Internal),
    }
}

fn of_forest(error: &vfs::ForestError) -> Option<Problem> {
    use vfs::ForestError as Forest;
    match error {
        Forest::Layers { source, .. } => of_vfs(source),
        Forest::Full => Some(Problem::Local),
        Forest::NameTaken(_)
        | Forest::SlotTaken { .. }
        | Forest::NoSuchSlot(_)
        | Forest::NoSuchLayer(_)
        | Forest::NoSuchSnapshot(_) => Some(Problem::Internal),
    }
}

fn of_open(error: &vfs::OpenError) -> Option<Problem> {
    match error {
        vfs::OpenError::Bring { source, .. } => known(&**source),
        vfs::OpenError::Forgotten { .. } => Some(Problem::Internal),
        vfs::OpenError::Image { source, .. } => of_erofs(source),
    }
}

fn of_fuse(error: &fuse::ServeError) -> Option<Problem> {
    match error {
        fuse::ServeError::Mount(error) => Some(of_mount(error)),
        fuse::ServeError::Session { .. } => Some(Problem::Local),
    }
}

fn of_link(error: &fuse::LinkError) -> Option<Problem> {
    match error {
        fuse::LinkError::Incomplete | fuse::LinkError::Record(_) => Some(Problem::Unsupported),
        fuse::LinkError::Unreadable(source) => of_io_or_inside(source),
        fuse::LinkError::Over | fuse::LinkError::Elsewhere(_) => Some(Problem::Local),
    }
}

fn of_mount(error: &MountError) -> Problem {
    match error {
        MountError::Missing(_)
        | MountError::NotADirectory(_)
        | MountError::Stale(_)
        | MountError::Busy { .. }
        | MountError::NotMounted(_)
        | MountError::InUse(_) => Problem::MountPoint,
        MountError::NoFuse(_) | MountError::NoHelper(_) => Problem::Unsupported,
        MountError::Helper { .. } => Problem::Denied,
        MountError::System { source, .. } => of_io(source),
    }
}

fn of_loop(error: &LoopError) -> Problem {
    match error {
        LoopError::None(_) | LoopError::NoNode { .. } => Problem::Unsupported,
        LoopError::Exhausted(_) | LoopError::Elsewhere { .. } => Problem::Local,
        LoopError::Size { .. } => Problem::Corrupt,
        LoopError::System { source, .. } | LoopError::File { source, .. } => of_io(source),
    }
}

fn of_driver(error: &DriverError) -> Option<Problem> {
    Some(match error {
        DriverError::Slow { .. } | DriverError::NotMounted(_) | DriverError::NoFile(_) => Problem::Local,
        DriverError::Loop { source, .. } => of_loop(source),
        DriverError::Refused { source, .. } | DriverError::Stack(source) => of_mount(source),
        DriverError::Size { .. } => Problem::Corrupt,
        DriverError::Empty | DriverError::Uneven { .. } => Problem::Unsupported,
        DriverError::Owned(_) | DriverError::Taken { .. } => Problem::MountPoint,
        DriverError::Io { source, .. } => of_io(source),
    })
}

fn of_mounts(error: &MountsError) -> Option<Problem> {
    match error {
        MountsError::Io(error) => Some(of_io(&error.source)),
        MountsError::Taken(_) | MountsError::Own { .. } | MountsError::UpperTaken { .. } => Some(Problem::MountPoint),
    }
}

fn of_place(error: &PlaceError) -> Option<Problem> {
    match error {
        PlaceError::Io(error) => Some(of_io(&error.source)),
        PlaceError::Taken { .. } => Some(Problem::Local),
    }
}

fn of_browse(error: &BrowseError) -> Option<Problem> {
    match error {
        BrowseError::Missing(_)
        | BrowseError::NotADirectory(_)
        | BrowseError::NotAFile(_)
        | BrowseError::TooManyLinks(_) => Some(Problem::NotFound),
        BrowseError::Bring { source, .. } => known(&**source),
        BrowseError::Image { source, .. } => of_vfs(source),
        BrowseError::Write { source, .. } => Some(of_io(source)),
    }
}

/// An error of this program may travel inside of one that looks like the kernel's.
fn of_io_or_inside(error: &io::Error) -> Option<Problem> {
    let inside = error.get_ref().and_then(|inside| known(inside));
    inside.or_else(|| Some(of_io(error)))
}

/// The kernel's errors. Their list is the library's and may grow, so the rest is the machine's fault.
fn of_io(error: &io::Error) -> Problem {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound => Problem::NotFound,
        Kind::PermissionDenied => Problem::Denied,
        Kind::ConnectionRefused | Kind::ConnectionReset | Kind::TimedOut | Kind::HostUnreachable => {
            Problem::Unreachable
        }
        Kind::InvalidData | Kind::UnexpectedEof => Problem::Corrupt,
        Kind::Unsupported => Problem::Unsupported,
        _ => Problem::Local,
    }
}
