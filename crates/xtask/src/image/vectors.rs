//! Which functions touch vector registers.

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory};

use super::program::Program;

/// The first use in a function.
pub struct User {
    /// The function's name.
    pub function: String,
    /// The register's name.
    pub register: String,
    /// The instruction's address.
    pub address: u64,
    /// Whether the function comes ready-made with the toolchain.
    pub prebuilt: bool,
}

/// Every function that reads or writes an xmm, ymm, zmm, mm or x87 register.
pub fn users(program: &Program) -> Vec<User> {
    let mut factory = InstructionInfoFactory::new();
    let mut users = Vec::new();
    for function in &program.functions {
        let decoder = Decoder::with_ip(64, &function.code, function.start, DecoderOptions::NONE);
        let first = decoder.into_iter().find_map(|instruction| {
            let used = factory.info(&instruction).used_registers();
            let register = used.iter().map(|used| used.register());
            let mut wide =
                register.filter(|r| r.is_vector_register() || r.is_mm() || r.is_st() || r.is_k());
            wide.next().map(|register| (register, instruction.ip()))
        });
        if let Some((register, address)) = first {
            users.push(User {
                function: function.name.clone(),
                register: format!("{register:?}").to_lowercase(),
                address,
                prebuilt: function.prebuilt,
            });
        }
    }
    users
}
