//! Running containers: what is seen in them, from outside and from inside.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use headstart::model::Timestamp;
use headstart::testkit::tree::Listing;

use super::stage::Stage;
use crate::cli::stage::wait_until;

/// What can be seen of a container's files: from outside, file by file, and from inside, as a program prints it.
#[derive(Debug)]
pub(super) struct Seen {
    files: Listing,
    inside: String,
}

impl Seen {
    #[track_caller]
    pub(super) fn assert_equals(&self, judge: &Self) {
        self.files.assert_equals(&judge.files);
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        for (mine, theirs) in lines(&self.inside).iter().zip(lines(&judge.inside)) {
            assert_eq!(*mine, theirs);
        }
        assert_eq!(self.inside.len(), judge.inside.len());
    }

    /// How many files there are.
    pub(super) fn count(&self) -> usize {
        self.files.nodes.len()
    }
}

/// Lists a tree from inside: type, mode, owner, links, size, time and content of everything that is no mount of the runtime's.
const LIST: &str = r#"
seen() { find / -xdev \( -path /etc -o -path /proc -o -path /dev -o -path /sys -o -path /run \) -prune -o ! -path / "$@" {} + | sort; }
seen ! -type d -exec stat -c '%n %F %a %u %g %h %s %Y %t %T'
seen -type d -exec stat -c '%n %F %a %u %g %Y'
seen -type f -exec sha256sum
"#;

/// A running container, of those that [`Stage::start`] gives.
pub(super) struct Container<'a> {
    pub(super) stage: &'a Stage,
    pub(super) namespace: String,
    pub(super) id: String,
}

impl Container<'_> {
    /// The merged tree as the container has it, without what the runtime mounts on top.
    pub(super) fn rootfs(&self) -> PathBuf {
        let bundle = format!("c/state/io.containerd.runtime.v2.task/{}/{}", self.namespace, self.id);
        self.stage.path(&bundle).join("rootfs")
    }

    #[track_caller]
    pub(super) fn sees(&self) -> Seen {
        let files = Listing::of_directory(&self.rootfs()).unwrap_or_else(|error| panic!("{error:#}"));
        let mut files = files.without_directory_sizes().without_directory_links();
        // The root's time is that of its upper directory, which was made with the container.
        files.nodes.get_mut(&b""[..]).expect("a tree has a root").attributes.mtime = Timestamp::default();
        Seen { files, inside: self.exec(LIST) }
    }

    /// What a shell in the container prints for `script`, which must succeed.
    #[track_caller]
    pub(super) fn exec(&self, script: &str) -> String {
        self.try_exec(script).unwrap_or_else(|error| panic!("{error}\n{}", self.stage.logs()))
    }

    pub(super) fn try_exec(&self, script: &str) -> Result<String, String> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("e{}", NEXT.fetch_add(1, Ordering::Relaxed));
        // ctr ends its copying when the process has ended, and loses what was not copied then: a file does not.
        let script = format!("({script}\n) > /run/out/{name}");
        let words = ["-n", &self.namespace, "task", "exec", "--exec-id", &name, &self.id, "sh", "-c", &script];
        self.stage.ctr(&words)?;
        Ok(fs::read_to_string(self.stage.path(&format!("out-{}", self.id)).join(name)).unwrap())
    }

    /// Ends and removes it, with its snapshot.
    #[track_caller]
    pub(super) fn end(self) {
        let Self { stage, namespace, id } = self;
        stage.ok(&["-n", &namespace, "task", "kill", "--signal", "SIGKILL", &id]);
        // The exit is told asynchronously; what cannot be deleted yet can be a moment later.
        wait_until("the end of a container", || {
            let said = stage.ctr(&["-n", &namespace, "task", "delete", &id]);
            said.is_ok() || said.is_err_and(|error| error.contains("not found") || error.contains("non-zero exit code"))
        });
        stage.ok(&["-n", &namespace, "container", "rm", &id]);
    }
}
