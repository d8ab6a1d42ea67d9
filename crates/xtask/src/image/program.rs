//! An ELF image as functions with their bytes.

use std::collections::HashSet;
use std::path::Path;

use object::read::archive::ArchiveFile;
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

use crate::sh::{Stop, fail};

/// A function of the image.
pub struct Function {
    /// Address of its first byte.
    pub start: u64,
    /// Its machine code.
    pub code: Vec<u8>,
    /// Its symbol as the source has it.
    pub name: String,
    /// Whether it comes ready-made from the toolchain's libraries.
    pub prebuilt: bool,
}

/// The image.
pub struct Program {
    /// Sorted by address; of several names for one address the first one.
    pub functions: Vec<Function>,
    sections: Vec<(u64, Vec<u8>)>,
}

impl Program {
    /// Reads the image, and from the toolchain's libraries in `libraries` which functions were not compiled for it.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read(image: &Path, libraries: &Path) -> Result<Self, Stop> {
        let ready = ready_made(libraries)?;
        let data = std::fs::read(image)?;
        let file = object::File::parse(&*data).map_err(|error| Stop::Failed(error.to_string()))?;
        let mut sections = Vec::new();
        for section in file.sections() {
            if let (true, Ok(bytes)) = (section.address() != 0, section.data()) {
                sections.push((section.address(), bytes.to_vec()));
            }
        }
        let mut program = Self {
            functions: Vec::new(),
            sections,
        };
        for symbol in file.symbols() {
            let Ok(name) = symbol.name() else { continue };
            if symbol.kind() != SymbolKind::Text || symbol.size() == 0 {
                continue;
            }
            let Some(code) = program.bytes(symbol.address(), symbol.size() as usize) else {
                continue;
            };
            program.functions.push(Function {
                start: symbol.address(),
                code: code.to_vec(),
                name: format!("{:#}", rustc_demangle::demangle(name)),
                prebuilt: ready.contains(name),
            });
        }
        program.functions.sort_by_key(|function| function.start);
        program.functions.dedup_by_key(|function| function.start);
        if program.functions.is_empty() {
            return fail(format!("{} has no function symbols", image.display()));
        }
        Ok(program)
    }

    /// The function that begins at `address`.
    pub fn at(&self, address: u64) -> Option<usize> {
        self.functions
            .binary_search_by_key(&address, |function| function.start)
            .ok()
    }

    /// The 64-bit word at `address`, as the image holds it before it runs: an entry of a table of addresses.
    pub fn word(&self, address: u64) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(address, 8)?.try_into().ok()?))
    }

    fn bytes(&self, address: u64, length: usize) -> Option<&[u8]> {
        self.sections.iter().find_map(|(start, bytes)| {
            let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
            bytes.get(offset..offset.checked_add(length)?)
        })
    }
}

/// The names of all functions defined in the toolchain's libraries.
fn ready_made(folder: &Path) -> Result<HashSet<String>, Stop> {
    let mut names = HashSet::new();
    for file in std::fs::read_dir(folder)? {
        let path = file?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let wanted = ["libcore-", "liballoc-", "libcompiler_builtins-"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        if !wanted || !name.ends_with(".rlib") {
            continue;
        }
        let data = std::fs::read(&path)?;
        let archive =
            ArchiveFile::parse(&*data).map_err(|error| Stop::Failed(error.to_string()))?;
        for member in archive.members() {
            let read = |error: object::Error| Stop::Failed(format!("{}: {error}", path.display()));
            let member = member.map_err(read)?;
            if member.name().ends_with(b".o") {
                let object =
                    object::File::parse(member.data(&*data).map_err(read)?).map_err(read)?;
                let defined = object.symbols().filter(|symbol| symbol.is_definition());
                names.extend(defined.filter_map(|symbol| symbol.name().ok().map(str::to_owned)));
            }
        }
    }
    if names.is_empty() {
        return fail(format!("no core library in {}", folder.display()));
    }
    Ok(names)
}
