//! The container runtime interface of a real containerd, as kubelet calls it.

use std::path::Path;
use std::time::Duration;

use headstart::grpc::connect;
use headstart::grpc::proto::runtime::v1::image_service_client::ImageServiceClient;
use headstart::grpc::proto::runtime::v1::runtime_service_client::RuntimeServiceClient;
use headstart::grpc::proto::runtime::v1::{
    AuthConfig, ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, IdMapping, ImageSpec,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopPodSandboxRequest, UserNamespace,
    VersionRequest,
};
use tonic::Status;
use tonic::transport::Channel;

/// Longest time a call may take: pulls on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// A pod that runs.
#[derive(Debug, Clone)]
pub(super) struct Pod {
    id: String,
    config: PodSandboxConfig,
}

/// The runtime interface of one containerd. Every call answers within [`PATIENCE`] or is an error.
#[derive(Debug)]
pub(super) struct Cri {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() })
}

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}

impl Cri {
    /// Connects when it is first used.
    pub(super) fn of(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let channel = runtime.block_on(async { connect(socket) });
        Self { runtime, channel }
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    fn runtimes(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    fn wait<A>(&self, call: impl Future<Output = Result<tonic::Response<A>, Status>>) -> Result<A, Status> {
        self.runtime.block_on(async {
            match tokio::time::timeout(PATIENCE, call).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => Err(Status::deadline_exceeded(format!("no answer in {PATIENCE:?}"))),
            }
        })
    }

    /// Whether it answers at all.
    pub(super) fn is_ready(&self) -> bool {
        self.wait(self.runtimes().version(VersionRequest::default())).is_ok()
    }

    /// Pulls and unpacks; the answer is the image's identifier.
    pub(super) fn pull(&self, image: &str) -> Result<String, Status> {
        let request = PullImageRequest { image: spec(image), ..PullImageRequest::default() };
        self.wait(self.images().pull_image(request)).map(|answer| answer.image_ref)
    }

    /// The same as a kubelet with a pull secret does it.
    pub(super) fn pull_with(&self, image: &str, username: &str, password: &str) -> Result<String, Status> {
        let (username, password) = (username.to_owned(), password.to_owned());
        let auth = Some(AuthConfig { username, password, ..AuthConfig::default() });
        let request = PullImageRequest { image: spec(image), auth, ..PullImageRequest::default() };
        self.wait(self.images().pull_image(request)).map(|answer| answer.image_ref)
    }

    pub(super) fn remove_image(&self, image: &str) -> Result<(), Status> {
        self.wait(self.images().remove_image(RemoveImageRequest { image: spec(image) })).map(drop)
    }

    /// A pod without a network of its own.
    pub(super) fn run_pod(&self, name: &str) -> Result<Pod, Status> {
        let network = NamespaceOption { network: NamespaceMode::Node.into(), ..NamespaceOption::default() };
        self.run_pod_in(name, network)
    }

    /// A pod whose root is another user and another group of this machine, with a network of its own.
    pub(super) fn run_pod_as(&self, name: &str, user: u32, group: u32) -> Result<Pod, Status> {
        let ids = |host_id| vec![IdMapping { host_id, container_id: 0, length: 65536 }];
        let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids(user), gids: ids(group) };
        self.run_pod_in(name, NamespaceOption { userns_options: Some(users), ..NamespaceOption::default() })
    }

    fn run_pod_in(&self, name: &str, namespaces: NamespaceOption) -> Result<Pod, Status> {
        let namespace_options = Some(namespaces);
        let context = LinuxSandboxSecurityContext { namespace_options, ..LinuxSandboxSecurityContext::default() };
        let metadata = PodSandboxMetadata {
            name: name.to_owned(),
            uid: name.to_owned(),
            namespace: "tests".to_owned(),
            ..PodSandboxMetadata::default()
        };
        let linux = LinuxPodSandboxConfig { security_context: Some(context), ..LinuxPodSandboxConfig::default() };
        let config = PodSandboxConfig { metadata: Some(metadata), linux: Some(linux), ..PodSandboxConfig::default() };
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..RunPodSandboxRequest::default() };
        let id = self.wait(self.runtimes().run_pod_sandbox(request))?.pod_sandbox_id;
        Ok(Pod { id, config })
    }

    /// A container in a pod, started.
    pub(super) fn run_container(&self, pod: &Pod, image: &str, command: &[&str]) -> Result<String, Status> {
        // Its namespaces are those of the pod.
        let context = pod.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let context = LinuxContainerSecurityContext {
            namespace_options: context.and_then(|context| context.namespace_options.clone()),
            ..LinuxContainerSecurityContext::default()
        };
        let linux = LinuxContainerConfig { security_context: Some(context), ..LinuxContainerConfig::default() };
        let config = ContainerConfig {
            linux: Some(linux),
            metadata: Some(ContainerMetadata { name: "main".to_owned(), ..ContainerMetadata::default() }),
            image: spec(image),
            command: words(command),
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let container_id = self.wait(self.runtimes().create_container(request))?.container_id;
        self.wait(self.runtimes().start_container(StartContainerRequest { container_id: container_id.clone() }))?;
        Ok(container_id)
    }

    /// What a command in a container prints that must succeed.
    pub(super) fn exec(&self, container: &str, command: &[&str]) -> Result<String, Status> {
        let request = ExecSyncRequest { container_id: container.to_owned(), cmd: words(command), timeout: 0 };
        let answer = self.wait(self.runtimes().exec_sync(request))?;
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        if answer.exit_code == 0 {
            return Ok(text);
        }
        let errors = String::from_utf8_lossy(&answer.stderr);
        Err(Status::unknown(format!("{command:?} ended with {}: {text}{errors}", answer.exit_code)))
    }

    /// Stops and removes a pod with its containers.
    pub(super) fn remove_pod(&self, pod: &Pod) -> Result<(), Status> {
        let pod_sandbox_id = pod.id.clone();
        self.wait(self.runtimes().stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }))?;
        self.wait(self.runtimes().remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id })).map(drop)
    }
}
