//! The recorded programs that a boot runs: opened and checked before anything is built (I2 of [`boot`](super)).

use crate::embedded;
use crate::input::{InputError, lines::Source, oracle, trace};
use crate::replay;

/// A recorded program that waits for its turn.
pub struct Waiting {
    /// The file's name without its folder.
    pub name: String,
    /// Its lines from the second on.
    pub reader: trace::Reader,
}

/// Opens the traces that were named, or all embedded ones; reads each to its end, so that a broken one is refused before
/// anything runs.
///
/// # Errors
/// The first one that cannot be read.
pub fn open_traces(files: &[String]) -> Result<Vec<Waiting>, InputError> {
    let open = |name: &str, source: Source| -> Result<Waiting, InputError> {
        Ok(Waiting {
            name: replay::short_name(name).to_string(),
            reader: reader(source)?,
        })
    };
    if files.is_empty() {
        return embedded::TRACES
            .iter()
            .map(|t| open(t.name, t.open()?))
            .collect();
    }
    let mut out = Vec::new();
    for file in files {
        if file != "-" {
            let mut dry = reader(Source::open(file)?)?;
            while dry.next_event()?.is_some() {}
        }
        out.push(open(file, Source::open(file)?)?);
    }
    Ok(out)
}

fn reader(mut source: Source) -> Result<trace::Reader, InputError> {
    let name = source.name().to_string();
    let first = source.next_strict()?;
    let at = crate::input::field::At {
        file: &name,
        line: 1,
    };
    match oracle::kind(at, first.as_deref())? {
        oracle::RunKind::Trace => trace::Reader::new(source, &first.unwrap_or_default()),
        oracle::RunKind::Fuzz => {
            let heading = first.unwrap_or_default();
            Err(at.error(
                "heading",
                &heading,
                "is a fuzz file; boot runs traces, replay runs both",
            ))
        }
    }
}
