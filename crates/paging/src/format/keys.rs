//! Protection keys that a format is known to have when the program is compiled.

use core::marker::PhantomData;

use super::Format;

/// Protection key number `N` of format `F`; does not compile where the format has no such key.
///
/// [`Attributes::pkey`](crate::Attributes::pkey) takes any number, and a format without keys refuses it when it is mapped.
///
/// # Examples
///
/// ```
/// use kmem_paging::format::{ProtectionKey, X86_64};
/// use kmem_paging::{Attributes, Rights};
///
/// const SECRETS: u8 = ProtectionKey::<X86_64, 3>::KEY;
/// assert_eq!(Attributes::new(Rights::USER_DATA).pkey(SECRETS).pkey, 3);
/// ```
///
/// PAE has the same bits reserved:
///
/// ```compile_fail,E0080
/// use kmem_paging::format::{ProtectionKey, X86Pae};
///
/// const SECRETS: u8 = ProtectionKey::<X86Pae, 3>::KEY;
/// ```
#[doc(alias = "pkey")]
#[derive(Debug)]
pub struct ProtectionKey<F, const N: u8>(PhantomData<F>);

impl<F: Format, const N: u8> ProtectionKey<F, N> {
    /// The key.
    pub const KEY: u8 = {
        assert!(
            N < F::PROTECTION_KEYS,
            "this page-table format has no room for that protection key"
        );
        N
    };
}
