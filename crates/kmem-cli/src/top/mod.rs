//! `kmem top`: a live view of a running workload, in the manner of slabtop.
//!
//! ```text
//!   workload ── a slice of calls ──> memory manager
//!      ^                                   │ figures, read from its own state
//!      └──────────── next slice <── draw ──┘
//! ```
//! One thread does both in turn, so that a picture never shows a half-made change. Without a terminal (in a pipe, or with
//! `--once`) the workload runs to its end and one picture is printed as text.

pub mod programs;
pub mod view;

use crate::args::Top;
use crate::input::{InputError, lines::Source, map};
use crate::say;
use crate::world::World;
use crate::{Status, boot};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};
use view::View;

/// Processors of the machine.
const CPUS: usize = 2;

/// Runs the command.
///
/// # Errors
/// Unusable input, or a terminal that cannot be used.
pub fn main(args: &Top) -> Result<Status, InputError> {
    let map = map::read(match &args.map {
        Some(path) => Source::open(path)?,
        None => boot::default_map()?,
    })?;
    let world = World::new(&map, CPUS)?;
    let plain = args.once || !io::stdout().is_terminal();
    let mut work = programs::Programs::new(world, &args.trace, !plain)?;
    if plain {
        say!("{}", once(&mut work).trim_end());
    } else {
        live(&mut work).map_err(|e| InputError::new("terminal", 0, "screen", "", e.to_string()))?;
    }
    Ok(Status::Held)
}

/// What runs under the view.
pub trait Workload {
    /// Makes a slice of calls; `false` when there is nothing left to do.
    fn advance(&mut self) -> bool;

    /// Reads the figures.
    fn view(&self) -> View;
}

/// Runs a workload under a live view until it ends or the user leaves with `q`, escape or control-C.
///
/// # Errors
/// If the terminal cannot be used.
pub fn live(workload: &mut dyn Workload) -> io::Result<()> {
    let mut terminal = ratatui::try_init()?;
    let frame = Duration::from_millis(100);
    let mut running = true;
    let result = loop {
        let until = Instant::now() + frame;
        while running && Instant::now() < until {
            running = workload.advance();
        }
        let view = workload.view();
        if let Err(e) = terminal.draw(|f| view.draw(f, running)) {
            break Err(e);
        }
        // A workload that is done leaves its last picture until the user has seen it.
        let wait = if running { Duration::ZERO } else { frame };
        match event::poll(wait).and_then(|any| {
            if any {
                event::read().map(Some)
            } else {
                Ok(None)
            }
        }) {
            Ok(Some(Event::Key(key))) => {
                let interrupt =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                if interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                    break Ok(());
                }
            }
            Ok(_) => {}
            Err(e) => break Err(e),
        }
    };
    ratatui::try_restore()?;
    result
}

/// Runs a workload to its end and prints the last picture as plain text.
pub fn once(workload: &mut dyn Workload) -> String {
    while workload.advance() {}
    workload.view().text(120)
}
