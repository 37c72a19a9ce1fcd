//! `headstart serve`.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use super::Context;
use crate::cli::args;
use crate::cli::exit::{Problem, Told};
use crate::cli::output;
use crate::oci::{LayoutImage, Reference};
use crate::serve::{ServeConfig, Server};

pub(crate) fn run(context: &Context, arguments: args::Serve) -> anyhow::Result<ExitCode> {
    let args::Serve { layout, listen, latency, bandwidth, access_log } = arguments;
    let Reference::Layout { path, image: LayoutImage::Only } = layout else {
        let message = format!("cannot serve {layout}: only a whole image layout can be served, written oci:DIR");
        return Err(Told { problem: Problem::Usage, message }.into());
    };
    context.runtime()?.block_on(async {
        // Installed before the address is told, so that whoever reads it can stop us.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let server = Server::bind(ServeConfig { layout: path, listen, latency, bandwidth, access_log }).await?;
        output::line(&format!("http://{}", server.address()))?;
        let stop = async move {
            tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => () }
        };
        server.run(stop).await?;
        Ok(ExitCode::SUCCESS)
    })
}
