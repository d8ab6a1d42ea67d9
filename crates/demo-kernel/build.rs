//! Every link argument of the image stands here, so that a plain `cargo build` makes it bootable; and the programs of
//! user mode are built here, by the C compiler that links Rust programs too.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let folder = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets it"));
    for input in ["build.rs", "kernel.ld", "user"] {
        println!("cargo:rerun-if-changed={input}");
    }
    let script = format!("-Wl,-T,{}/kernel.ld", folder.display());
    for argument in [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        &script,
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=0x1000",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    programs(&folder.join("user"), &out);
}

/// Builds each `user/*.c` without a library and each `user/hosted/*.c` with the system's, and lists them.
fn programs(folder: &Path, out: &Path) {
    let mut list = String::new();
    let mut count = 0;
    // Beside the kernel's image, for the runner: OUT_DIR is PROFILE/build/PACKAGE/out.
    let copies = out
        .ancestors()
        .nth(3)
        .expect("cargo's layout")
        .join("programs");
    std::fs::create_dir_all(&copies).expect("the build folder");
    for (folder, freestanding) in [(folder.to_owned(), true), (folder.join("hosted"), false)] {
        let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
            .expect("the folder of programs")
            .map(|entry| entry.expect("a folder that can be read").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
            .collect();
        files.sort();
        for source in files {
            let name = source
                .file_stem()
                .and_then(|name| name.to_str())
                .expect("a name");
            let program = out.join(name);
            let _ = std::fs::remove_file(&program);
            let mut compiler = Command::new("cc");
            compiler.args(["-O1", "-Wall", "-static", "-no-pie", "-fno-pie"]);
            if freestanding {
                compiler.args(["-nostdlib", "-ffreestanding", "-fno-stack-protector"]);
                compiler.args(["-fno-builtin", "-Wl,--build-id=none", "-Wl,-z,norelro"]);
            }
            compiler.arg(&source).arg("-o").arg(&program);
            let built = compiler.status().is_ok_and(|status| status.success());
            assert!(
                built || !freestanding,
                "cc cannot build {}",
                source.display()
            );
            if !built {
                // No static C library here: the scenario says that it was skipped.
                std::fs::write(&program, "").expect("the build folder");
            }
            std::fs::copy(&program, copies.join(name)).expect("the build folder");
            count += 1;
            list += &format!(
                "    Inode::program(\"/bin/{name}\", {}, include_bytes!(\"{}\")),\n",
                100 + count,
                program.display()
            );
        }
    }
    let text = format!(
        "/// The programs that are built into the image.\npub static PROGRAMS: [Inode; {count}] = [\n{list}];\n"
    );
    std::fs::write(out.join("programs.rs"), text).expect("the build folder");
}
