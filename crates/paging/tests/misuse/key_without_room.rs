//! PAE has no protection keys.
//~ error[E0080]
//~ this page-table format has no room for that protection key
//~ X86Pae
use kmem_paging::format::{ProtectionKey, X86Pae};

const KEY: u8 = ProtectionKey::<X86Pae, 1>::KEY;

fn main() {
    let _ = KEY;
}
