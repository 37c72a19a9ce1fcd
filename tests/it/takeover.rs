//! Servers of FUSE connections that die, and others that take their place under running readers. Needs root, /dev/fuse, loop
//! devices, EROFS and overlayfs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use headstart::chain::LayerId;
use headstart::drivers::{KernelMounts, LayerBacking, Presented, RunDirectory};
use headstart::fuse::{Kept, Link, LinkError, ServeOptions, Server, serve, serve_link};
use headstart::model::{Algorithm, BlobDigest, DiffId, Digest, Name};
use headstart::sys::descriptors::{packet_pair, receive, send};
use headstart::sys::fuse::is_connected;
use headstart::sys::mount::{Unmount, unmount};
use headstart::testkit::lazy::{LazyBytes, LazyLayer, Reaction};
use headstart::testkit::waiting::PATIENCE;
use headstart::vfs::{Forest, LayerSlot, SnapshotSlot, open_layers};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use crate::cli::stage::{Registry, Stage, noise, tar, wait_until};
use crate::daemon::Daemon;
use crate::drivers::{Readers, contents, eventually, layer_of};

/// The files of a layer, which are the same in every process.
fn files(layer: u8) -> BTreeMap<String, Vec<u8>> {
    contents(layer, 24)
}

fn diff_id(image: &[u8]) -> DiffId {
    DiffId(Digest::of(Algorithm::Sha256, image))
}

/// The process that serves: a forest of two layers and a snapshot of them, whose slots are written down here.
#[test]
#[ignore = "a server that other tests start as another process"]
fn a_process_that_serves_a_forest() {
    let place = PathBuf::from(std::env::var_os("TAKEOVER_PLACE").unwrap());
    let keeper = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut words = [0; 64];
    let (length, kept) = receive(&keeper, &mut words).unwrap();
    let word = std::str::from_utf8(&words[..length]).unwrap();
    let forest = Arc::new(Forest::new());
    let options = ServeOptions { patience: PATIENCE, ..ServeOptions::for_this_user("takeover") };
    let taken = |kept| Link::take_up(Kept::found(kept).unwrap(), &place).unwrap();
    // What comes before everything is there again has to wait.
    let server = match word {
        "new" => serve(Arc::clone(&forest), &place, &options).unwrap(),
        "go on" => serve_link(Arc::clone(&forest), taken(kept), &options).unwrap(),
        "go on as before 6.9" => serve_link(Arc::clone(&forest), taken(kept).without_resend(), &options).unwrap(),
        other => panic!("{other}"),
    };
    let mut sources = Vec::new();
    for (layer, slot) in [(0, 3), (1, 170)] {
        let image = layer_of(&files(layer));
        let diff_id = diff_id(&image);
        let bytes = LazyBytes::new(image, 1 << 14);
        let mut opened = open_layers(&[(LazyLayer(Arc::clone(&bytes)), Vec::new())]).unwrap();
        forest.add_layer(diff_id, Arc::new(opened.remove(0)), Some(LayerSlot(slot))).unwrap();
        sources.push(bytes);
    }
    let name = Name::new(&b"42"[..]).unwrap();
    let slot = Some(SnapshotSlot(9));
    forest.add_snapshot(&name, &[LayerSlot(3), LayerSlot(170)], slot).unwrap();
    server.is_complete();
    {
        let kept = server.kept();
        send(&keeper, b"ready", &kept.as_ref().unwrap().descriptors()).unwrap();
    }
    // The other side closes when there is nothing more to say.
    if receive(&keeper, &mut words).unwrap().0 > 0 {
        for bytes in &sources {
            bytes.script(|_, _| Reaction::Hold);
            bytes.forget();
        }
        send(&keeper, b"holding", &[]).unwrap();
        sources[1].wait_for_held(1);
        send(&keeper, b"held", &[]).unwrap();
    }
    server.wait();
}

/// A connection whose server is killed and followed by another. This process keeps what has to be kept.
struct Relay {
    dir: tempfile::TempDir,
    server: Option<Child>,
    words: Option<OwnedFd>,
    kept: Vec<OwnedFd>,
}

impl Relay {
    fn begin() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["fs", "mnt"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let mut relay = Self { dir, server: None, words: None, kept: Vec::new() };
        relay.next("new");
        // When a file is closed the kernel asks the server, until it is told that it need not. A process that is started
        // from here closes what readers here have open, and must not wait for a server that it is to become.
        drop(fs::File::open(relay.tree().join(files(0).keys().next().unwrap())).unwrap());
        relay
    }

    /// Lets the server keep readers of the upper layer waiting: done when somebody reads it.
    fn hold(&self, reads: impl FnOnce()) {
        let words = self.words.as_ref().unwrap();
        send(words, b"hold", &[]).unwrap();
        Self::hear(words, "holding");
        reads();
        Self::hear(words, "held");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tree(&self) -> PathBuf {
        self.path("fs/snapshots/42")
    }

    /// Starts the next server, and waits until it serves.
    fn next(&mut self, word: &str) {
        let (ours, theirs) = packet_pair().unwrap();
        let kept: Vec<_> = self.kept.iter().map(|descriptor| descriptor.as_fd()).collect();
        send(&ours, word.as_bytes(), &kept).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "takeover::a_process_that_serves_a_forest", "--ignored", "--nocapture"])
            .env("TAKEOVER_PLACE", self.path("fs"))
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.server = Some(child);
        self.kept = Self::hear(&ours, "ready");
        assert_eq!(self.kept.len(), 2);
        self.words = Some(ours);
    }

    #[track_caller]
    fn hear(words: &OwnedFd, expected: &str) -> Vec<OwnedFd> {
        let patience = Timespec::try_from(PATIENCE).unwrap();
        let heard = poll(&mut [PollFd::new(words, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(heard, 1, "the server never says {expected:?}");
        let mut said = [0; 64];
        let (length, kept) = receive(words, &mut said).unwrap();
        assert_eq!(std::str::from_utf8(&said[..length]).unwrap(), expected);
        kept
    }

    fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
    }

    /// The lazy files stacked by the kernel.
    fn present(&self) -> (KernelMounts, Presented) {
        let mounts = KernelMounts::new(RunDirectory::claim(&self.path("run")).unwrap(), PATIENCE, false);
        let backings: Vec<_> = (0..2)
            .zip(0..)
            .map(|(layer, number)| {
                let image = layer_of(&files(layer));
                let diff_id = diff_id(&image);
                let lazy = Some(self.path("fs/layers").join(diff_id.to_string()));
                let id = LayerId { diff_id, blob: BlobDigest(diff_id.0), anchor: "whole".to_owned() };
                LayerBacking { number, id, size: image.len() as u64, lazy, local: None, tree: None }
            })
            .collect();
        let presented = mounts.present(&backings, &self.path("mnt"), None).unwrap();
        (mounts, presented)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            // It may have ended already.
            server.kill().ok();
            server.wait().ok();
        }
        // Whoever still waits waits no more.
        self.kept.clear();
        unmount(&self.path("fs"), Unmount::Lazy).ok();
    }
}

#[test]
fn readers_of_both_drivers_do_not_notice_that_servers_die() {
    const KILLS: usize = 20;
    let mut relay = Relay::begin();
    let (mounts, presented) = relay.present();
    let all: BTreeMap<_, _> = (0..2).flat_map(files).collect();
    let through_fuse = Readers::start(&relay.tree(), &all, 2);
    let through_kernel = Readers::start(presented.target(), &all, 2);
    for _ in 0..KILLS {
        through_fuse.wait_for(40);
        through_kernel.wait_for(10);
        relay.kill();
        relay.next("go on");
        // The kernel is to ask again for names, and for the pages of the lazy files.
        headstart::sys::mount::drop_unused(&relay.path("fs")).unwrap();
        for entry in fs::read_dir(relay.path("fs/layers")).unwrap() {
            let file = fs::File::open(entry.unwrap().path()).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
    }
    through_fuse.wait_for(40);
    through_kernel.wait_for(40);
    let ((reads, longest), (kernel_reads, kernel_longest)) = (through_fuse.finish(), through_kernel.finish());
    println!(
        "{KILLS} servers: {reads} reads through fuse, longest {longest:?}; {kernel_reads} through the kernel, longest {kernel_longest:?}"
    );
    drop((presented, mounts));
}

#[test]
fn a_read_that_waits_is_answered_by_the_next_server() {
    for next in ["go on", "go on as before 6.9"] {
        let mut relay = Relay::begin();
        let (name, content) = files(1).pop_first().unwrap();
        let path = relay.tree().join(name);
        let mut reader = None;
        relay.hold(|| reader = Some(thread::spawn(move || fs::read(path))));
        relay.kill();
        relay.next(next);
        let read = reader.unwrap().join().unwrap().unwrap_or_else(|error| panic!("{next}: {error}"));
        assert!(read == content, "{next}: wrong bytes");
    }
}

#[test]
fn without_a_next_server_readers_fail_when_nothing_is_kept_any_more() {
    let mut relay = Relay::begin();
    let path = relay.tree().join(files(1).pop_first().unwrap().0);
    let mut reader = None;
    relay.hold(|| reader = Some(thread::spawn(move || fs::read(path))));
    let reader = reader.unwrap();
    relay.kill();
    assert!(is_connected(&relay.kept[0]) || is_connected(&relay.kept[1]));
    assert!(!reader.is_finished());
    relay.kept.clear();
    let error = reader.join().unwrap().unwrap_err();
    let errno = rustix::io::Errno::from_io_error(&error).unwrap();
    assert!(
        [rustix::io::Errno::NOTCONN, rustix::io::Errno::CONNABORTED, rustix::io::Errno::IO].contains(&errno),
        "{error}"
    );
}

fn kept_again(server: &Server) -> Kept {
    let kept = server.kept();
    let descriptors = kept.as_ref().unwrap().descriptors();
    Kept::found(descriptors.iter().map(|descriptor| descriptor.try_clone_to_owned().unwrap()).collect()).unwrap()
}

#[test]
fn only_the_living_connection_of_its_place_is_taken_over() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let serve_on = |place: &Path| {
        let forest: Arc<Forest<LazyLayer>> = Arc::new(Forest::new());
        serve(forest, place, &ServeOptions::for_this_user("takeover")).unwrap()
    };
    let (first, second) = (serve_on(one.path()), serve_on(other.path()));
    let refused = Link::take_up(kept_again(&first), other.path()).unwrap_err();
    assert!(matches!(refused, LinkError::Elsewhere(_)), "{refused}");
    let link = Link::take_up(kept_again(&second), other.path()).unwrap();
    assert!(link.was_served());
    drop(link);
    let kept = kept_again(&second);
    second.unmount(Unmount::Strict).unwrap();
    second.wait();
    assert!(second.kept().is_none(), "an ended connection is kept");
    let refused = Link::take_up(kept, other.path()).unwrap_err();
    assert!(matches!(refused, LinkError::Over), "{refused}");
}

#[test]
fn what_the_kernel_knew_before_is_served_until_it_is_dropped() {
    let mut relay = Relay::begin();
    let name = files(0).pop_first().unwrap().0;
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
    let open = fs::File::open(relay.tree().join(&name)).unwrap();
    let (tree, file) = (inode(&relay.tree()), inode(&relay.tree().join(&name)));
    relay.kill();
    relay.next("go on");
    headstart::sys::mount::drop_unused(&relay.path("fs")).unwrap();
    assert_eq!((inode(&relay.tree()), inode(&relay.tree().join(&name))), (tree, file));
    let mut content = Vec::new();
    (&open).read_to_end(&mut content).unwrap();
    assert!(content == files(0)[&name]);
    eventually("the listing is not told", || fs::read_dir(relay.path("fs/layers")).unwrap().count() == 2);
}

/// A stage whose daemon leaves its mounts when it is asked to end.
fn stage_that_keeps() -> Stage {
    let stage = Stage::new();
    stage.settle(&mut Command::new("true"));
    let config = stage.path("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("keep_mounts = false"));
    fs::write(&config, text.replace("keep_mounts = false", "keep_mounts = true")).unwrap();
    stage
}

/// An image of two layers whose files are [`files`], mounted through the daemon with both lazy drivers.
fn mounted_twice(stage: &Stage) -> (Registry, [PathBuf; 2]) {
    let tars: Vec<_> = (0..2)
        .map(|layer| {
            let files = files(layer);
            let mut entries: Vec<(String, &[u8])> = vec![(format!("dir{layer}/"), b"")];
            entries.extend(files.iter().map(|(name, content)| (name.clone(), content.as_slice())));
            tar(&entries.iter().map(|(name, content)| (name.as_str(), *content)).collect::<Vec<_>>())
        })
        .collect();
    let (_, converted) = stage.images(&tars);
    let registry = stage.serve(&converted, &[]);
    let points = ["fuse", "kernel"].map(|driver| {
        let point = stage.make(driver);
        stage.ok(&["mount", "--driver", driver, &registry.image(), point.to_str().unwrap()]);
        point
    });
    (registry, points)
}

fn all_files() -> BTreeMap<String, Vec<u8>> {
    (0..2).flat_map(files).collect()
}

#[test]
fn readers_do_not_notice_that_the_daemon_is_killed() {
    const KILLS: usize = 20;
    let stage = Stage::new();
    let mut daemon = Daemon::start(&stage);
    let (registry, points) = mounted_twice(&stage);
    let readers = points.each_ref().map(|point| Readers::start(point, &all_files(), 2));
    for _ in 0..KILLS {
        readers.iter().for_each(|readers| readers.wait_for(20));
        daemon.kill();
        daemon = Daemon::start(&stage);
        assert!(daemon.log().contains("is taken over"), "{}", daemon.log());
    }
    readers.iter().for_each(|readers| readers.wait_for(40));
    let [through_fuse, through_kernel] = readers.map(Readers::finish);
    println!("{KILLS} daemons: through fuse {through_fuse:?}, through the kernel {through_kernel:?} (reads, longest)");
    let status = stage.status();
    let drivers: Vec<_> = status.iter().map(|mount| mount["driver"].as_str().unwrap()).collect();
    // What was read as a whole was handed over to the kernel meanwhile.
    assert!(drivers[0] == "fuse" && ["kernel", "local"].contains(&drivers[1]), "{status:?}");
    // New ones work beside them.
    let new = stage.make("new");
    stage.ok(&["mount", &registry.image(), new.to_str().unwrap()]);
    let (name, content) = all_files().pop_first().unwrap();
    assert!(fs::read(new.join(name)).unwrap() == content);
    daemon.end();
    stage.assert_clean();
}

#[test]
fn a_daemon_that_is_asked_to_end_leaves_its_mounts_to_the_next() {
    let stage = stage_that_keeps();
    let daemon = Daemon::start(&stage);
    let (_registry, points) = mounted_twice(&stage);
    let readers = points.each_ref().map(|point| Readers::start(point, &all_files(), 1));
    readers.iter().for_each(|readers| readers.wait_for(20));
    let log = daemon.end();
    assert!(log.contains("mounts stay for the next daemon"), "{log}");
    let daemon = Daemon::start(&stage);
    readers.iter().for_each(|readers| readers.wait_for(40));
    for readers in readers {
        readers.finish();
    }
    for point in &points {
        stage.ok(&["umount", point.to_str().unwrap()]);
    }
    // With nothing to be shown there is nothing to be left.
    let log = daemon.end();
    assert!(!log.contains("mounts stay"), "{log}");
    stage.assert_clean();
}

/// The process that holds the connection of a stage's daemon.
fn holder(stage: &Stage) -> Option<Pid> {
    let run = stage.path("run").into_os_string().into_encoded_bytes();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let mut ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let holds = |id: &i32| {
        let words = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        words.contains(&&b"hold"[..]) && words.contains(&run.as_slice())
    };
    ids.find(holds).and_then(Pid::from_raw)
}

#[test]
fn what_a_daemon_has_left_is_told_as_what_it_is() {
    let stage = stage_that_keeps();
    let daemon = Daemon::start(&stage);
    let (registry, [fuse, kernel]) = mounted_twice(&stage);
    let local = stage.make("local");
    stage.ok(&["pull", &registry.image()]);
    stage.ok(&["mount", "--driver", "local", &registry.image(), local.to_str().unwrap()]);
    stage.ok(&["umount", kernel.to_str().unwrap()]);
    daemon.end();
    let state = |point: &Path| {
        let status = stage.status();
        let mount = status.iter().find(|mount| mount["mount_point"].as_str() == point.to_str()).unwrap();
        mount["state"].as_str().unwrap().to_owned()
    };
    let found = || -> Vec<String> {
        let output = stage.run(&["--json", "doctor", "--quiet", "--containerd-config", "/no/such/file"]);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let findings = report["findings"].as_array().unwrap().iter();
        findings.map(|finding| finding["check"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!((state(&fuse).as_str(), state(&local).as_str()), ("kept", "alone"));
    assert!(stage.ok(&["status"]).contains("reads wait for the next daemon"));
    // What somebody needs is nothing to be cleaned up.
    assert!(found().contains(&"daemon".to_owned()) && !found().contains(&"leftovers".to_owned()), "{:?}", found());
    kill_process(holder(&stage).expect("somebody keeps the connection"), Signal::KILL).unwrap();
    eventually("the end of the connection", || state(&fuse) == "dead");
    assert_eq!(state(&local), "alone");
    assert!(found().contains(&"leftovers".to_owned()), "{:?}", found());
    for point in [&fuse, &local] {
        stage.ok(&["umount", point.to_str().unwrap()]);
    }
    Daemon::start(&stage).end();
    stage.assert_clean();
}

/// What a service manager with a store hears.
struct Manager {
    path: PathBuf,
    socket: UnixDatagram,
}

impl Manager {
    fn new(stage: &Stage) -> Self {
        let path = stage.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { path, socket }
    }

    fn runs(&self, command: &mut Command) {
        command.env("NOTIFY_SOCKET", &self.path).env("FDSTORE", "4");
    }

    /// The next descriptors that come.
    fn stored(&self) -> Vec<OwnedFd> {
        loop {
            let mut words = [0; 256];
            let (length, descriptors) = receive(&self.socket, &mut words).unwrap();
            if !descriptors.is_empty() {
                assert_eq!(&words[..length], b"FDSTORE=1\nFDNAME=headstart-fs\nFDPOLL=0");
                return descriptors;
            }
        }
    }
}

#[test]
fn a_service_that_is_stopped_leaves_its_mounts_for_a_while() {
    let stage = stage_that_keeps();
    let manager = Manager::new(&stage);
    let daemon = Daemon::start_with(&stage, |command| manager.runs(command));
    let store = manager.stored();
    let (_registry, points) = mounted_twice(&stage);
    let readers = points.each_ref().map(|point| Readers::start(point, &all_files(), 1));
    readers.iter().for_each(|readers| readers.wait_for(20));
    let log = daemon.end();
    assert!(log.contains("mounts stay for the next daemon"), "{log}");
    // This is what a manager does that does not restart it.
    drop(store);
    let daemon = Daemon::start_with(&stage, |command| manager.runs(command));
    assert!(daemon.log().contains("is taken over"), "{}", daemon.log());
    drop(manager.stored());
    wait_until("the process that bridged the time ends", || !stage.path("run/hold.sock").exists());
    readers.iter().for_each(|readers| readers.wait_for(40));
    for readers in readers {
        readers.finish();
    }
    for point in &points {
        stage.ok(&["umount", point.to_str().unwrap()]);
    }
    daemon.end();
    stage.assert_clean();
}

#[test]
fn a_daemon_that_cannot_start_leaves_the_connection_to_the_next() {
    let stage = Stage::new();
    let daemon = Daemon::start(&stage);
    let (registry, points) = mounted_twice(&stage);
    let written = stage.make("written");
    let upper = stage.path("upper");
    let (written_point, upper) = (written.to_str().unwrap(), upper.to_str().unwrap());
    stage.ok(&["mount", "--driver", "fuse", "--upper", upper, &registry.image(), written_point]);
    fs::write(written.join("new"), "new").unwrap();
    let open = fs::File::open(written.join("new")).unwrap();
    let readers = points.each_ref().map(|point| Readers::start(point, &all_files(), 1));
    readers.iter().for_each(|readers| readers.wait_for(20));
    daemon.kill();

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = stage.path("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.trim_end().ends_with("keep_mounts = false"), "{text}");
    fs::write(&config, format!("{text}metrics_listen = '{}'\n", taken.local_addr().unwrap())).unwrap();
    let (_, words) = stage.fails(&["daemon"]);
    assert!(words.contains("is taken over") && words.contains("cannot listen for metrics"), "{words}");
    fs::write(&config, text).unwrap();

    let daemon = Daemon::start(&stage);
    assert!(daemon.log().contains("is taken over"), "{}", daemon.log());
    readers.iter().for_each(|readers| readers.wait_for(40));
    for readers in readers {
        readers.finish();
    }
    let device = |metadata: fs::Metadata| std::os::unix::fs::MetadataExt::dev(&metadata);
    let same = device(open.metadata().unwrap()) == device(fs::metadata(written.join("new")).unwrap());
    assert!(same, "mounted anew: {}", daemon.log());
    let (name, content) = all_files().pop_first().unwrap();
    assert!(fs::read(written.join(name)).unwrap() == content);
    drop(open);
    daemon.end();
    stage.assert_clean();
}

#[test]
fn a_keeper_that_is_killed_is_followed_by_another() {
    let stage = Stage::new();
    let daemon = Daemon::start(&stage);
    let (_registry, points) = mounted_twice(&stage);
    let readers = points.each_ref().map(|point| Readers::start(point, &all_files(), 1));
    let keeper = holder(&stage).unwrap();
    kill_process(keeper, Signal::KILL).unwrap();
    wait_until("another keeper", || {
        daemon.log().contains("is there again") && holder(&stage).is_some_and(|other| other != keeper)
    });
    daemon.kill();
    let daemon = Daemon::start(&stage);
    assert!(daemon.log().contains("is taken over"), "{}", daemon.log());
    readers.iter().for_each(|readers| readers.wait_for(40));
    for readers in readers {
        readers.finish();
    }
    daemon.end();
    wait_until("the keeper ends with what it keeps", || holder(&stage).is_none());
    stage.assert_clean();
}

#[test]
fn a_layer_that_became_local_while_nobody_served_is_handed_over_under_its_readers() {
    let stage = Stage::new();
    let content = noise(31, 6 << 20);
    let (_, converted) = stage.images(&[tar(&[("large", &content)])]);
    let registry = stage.serve(&converted, &[]);
    let mnt = stage.make("mnt");
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", "--driver", "kernel", &registry.image(), mnt.to_str().unwrap()]);
    registry.pause();
    let (say, said) = std::sync::mpsc::channel();
    let path = mnt.join("large");
    let reader = thread::spawn(move || {
        say.send(fs::read_link("/proc/thread-self").unwrap()).unwrap();
        fs::read(path)
    });
    let waiting = Path::new("/proc").join(said.recv().unwrap()).join("stat");
    // Uninterruptible, again and again: it waits for the device.
    let seen = std::cell::Cell::new(0);
    wait_until("somebody reads what does not come", || {
        let waits = fs::read_to_string(&waiting).unwrap().rsplit(") ").next().unwrap().starts_with('D');
        seen.set(if waits { seen.get() + 1 } else { 0 });
        seen.get() == 20
    });
    daemon.kill();
    registry.go_on();
    stage.ok(&["pull", &registry.image()]);
    drop(registry);
    let daemon = Daemon::start(&stage);
    let read = reader.join().unwrap().unwrap_or_else(|error| panic!("{error}: {}", daemon.log()));
    assert!(read == content, "wrong bytes");
    assert_eq!(stage.status()[0]["driver"], "local", "{}", daemon.log());
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    daemon.end();
    stage.assert_clean();
}

#[test]
fn the_service_manager_keeps_the_connection() {
    // What is passed on begins at 3; the number of the process is known when it runs.
    const PASS_ON: &str = "exec 3<&0 4<&1 </dev/null >/dev/null; export LISTEN_PID=$$ LISTEN_FDS=2 \
                           LISTEN_FDNAMES=headstart-fs:headstart-fs; exec \"$@\"";
    let stage = Stage::new();
    let manager = Manager::new(&stage);
    let daemon = Daemon::start_with(&stage, |command| manager.runs(command));
    let mut store = manager.stored();
    // Systemd knows by the file whether it has something already.
    let files = |store: &[OwnedFd]| {
        let file = |descriptor: &OwnedFd| rustix::fs::fstat(descriptor).map(|stat| (stat.st_dev, stat.st_ino)).unwrap();
        store.iter().map(file).collect::<Vec<_>>()
    };
    let first = files(&store);
    assert!(!stage.path("run/hold.sock").exists(), "two keep what one is enough for");
    let (_registry, points) = mounted_twice(&stage);
    let readers = points.each_ref().map(|point| Readers::start(point, &all_files(), 1));
    let mut daemon = Some(daemon);
    for _ in 0..3 {
        readers.iter().for_each(|readers| readers.wait_for(20));
        daemon.take().unwrap().kill();
        let next = Daemon::start_with(&stage, |command| {
            manager.runs(command);
            let mut shell = Command::new("sh");
            shell.args(["-c", PASS_ON, "sh"]).arg(command.get_program()).args(command.get_args());
            for (name, value) in command.get_envs() {
                match value {
                    Some(value) => shell.env(name, value),
                    None => shell.env_remove(name),
                };
            }
            let [one, other] = <[OwnedFd; 2]>::try_from(std::mem::take(&mut store)).unwrap();
            shell.stdin(one).stdout(other).stderr(Stdio::null());
            *command = shell;
        });
        store = manager.stored();
        assert_eq!(files(&store), first, "what is stored grows with every daemon");
        daemon = Some(next);
    }
    readers.iter().for_each(|readers| readers.wait_for(40));
    for readers in readers {
        readers.finish();
    }
    daemon.take().unwrap().end();
    stage.assert_clean();
}
