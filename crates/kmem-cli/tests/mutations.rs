//! Whatever bytes a file holds, a reader answers with a map or a run, or with one line of error.

use kmem_cli::embedded::{FUZZ, MAPS, TRACES};
use kmem_cli::input::lines::Source;
use kmem_cli::input::{InputError, field::At, fuzz, map, oracle, trace};

/// xorshift64*: the same mutations in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// Changes a few bytes, doubles or drops a line, or cuts the end off.
fn mutate(text: &[u8], random: &mut Random) -> Vec<u8> {
    let mut out = text.to_vec();
    for _ in 0..=random.below(4) {
        if out.is_empty() {
            return out;
        }
        let at = random.below(out.len());
        match random.below(8) {
            0 => out.truncate(at),
            1 => {
                out.remove(at);
            }
            2 => out.insert(at, b"0f-x =+[]\n\0\xff"[random.below(12)]),
            3 => {
                let lines: Vec<&[u8]> = out.split_inclusive(|c| *c == b'\n').collect();
                let line = lines[random.below(lines.len())].to_vec();
                out.extend_from_slice(&line);
            }
            4 => {
                let lines: Vec<&[u8]> = out.split_inclusive(|c| *c == b'\n').collect();
                let drop = random.below(lines.len());
                out = lines
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| *i != drop)
                    .flat_map(|(_, l)| l.to_vec())
                    .collect();
            }
            _ => out[at] = b"0123456789abcdefrwxps- =E"[random.below(25)],
        }
    }
    out
}

fn read_run(mut source: Source) -> Result<(), InputError> {
    let name = source.name().to_string();
    let head = source.next_strict()?;
    let kind = oracle::kind(
        At {
            file: &name,
            line: 1,
        },
        head.as_deref(),
    )?;
    let head = head.unwrap_or_default();
    match kind {
        oracle::RunKind::Fuzz => {
            let mut reader = fuzz::Reader::new(source, &head)?;
            while reader.next_step()?.is_some() {}
        }
        oracle::RunKind::Trace => {
            let mut reader = trace::Reader::new(source, &head)?;
            while reader.next_event()?.is_some() {}
        }
    }
    Ok(())
}

fn text_of(mut source: Source) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(line) = source.next_lossy().unwrap() {
        out.extend_from_slice(line.as_bytes());
        out.push(b'\n');
    }
    out
}

fn check(result: Result<(), InputError>) -> usize {
    let Err(e) = result else { return 0 };
    let text = e.to_string();
    assert!(!text.contains('\n') && text.len() < 600, "{text}");
    1
}

#[test]
fn maps() {
    let mut random = Random(0x5eed);
    let mut refused = 0;
    for m in MAPS {
        let text = text_of(m.open().unwrap());
        for _ in 0..400 {
            let bytes: &'static [u8] = mutate(&text, &mut random).leak();
            refused += check(Source::embedded("m", bytes).and_then(map::read).map(drop));
        }
    }
    assert!(refused > 100, "{refused} of 2000 mutations were refused");
}

#[test]
fn runs() {
    let mut random = Random(0xfeed);
    let mut refused = 0;
    for r in [&TRACES[2], &TRACES[6], &FUZZ[0], &FUZZ[7]] {
        let text = text_of(r.open().unwrap());
        for _ in 0..150 {
            let bytes: &'static [u8] = mutate(&text, &mut random).leak();
            refused += check(Source::embedded("r", bytes).and_then(read_run));
        }
    }
    assert!(refused > 100, "{refused} of 600 mutations were refused");
}
