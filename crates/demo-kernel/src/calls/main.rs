//! One function for each public call of kmem, for `cargo xtask no-std`; the image is inspected and never run.
//!
//! The functions take everything by reference, so that nothing is computed beforehand, and stand in tables that the
//! linker must keep. A call whose stack is to be known gets a line in the file of its crate.
#![no_std]
#![no_main]

#[path = "../mem.rs"]
mod mem;

mod buddy;
mod cow_mm;
mod hal;
mod paging;
mod vma_tree;
mod vmalloc;

/// Defines `call_NAME` functions and keeps them in the image.
macro_rules! calls {
    ($($name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            fn $name($($argument: $type),*) $(-> $result)? $body
        )*
        #[used]
        static CALLS: crate::Table<{ [$(stringify!($name)),*].len() }> = crate::Table([$($name as *const ()),*]);
    };
}
pub(crate) use calls;

/// Addresses of functions of different types.
struct Table<const N: usize>([*const (); N]);
// SAFETY: nobody reads it.
unsafe impl<const N: usize> Sync for Table<N> {}

#[unsafe(no_mangle)]
extern "C" fn pvh_entry() {}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
