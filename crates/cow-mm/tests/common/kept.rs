//! What a world is made of lives as long as the process, or until its test says that nothing uses it any more.

use std::cell::RefCell;

thread_local! {
    /// What this thread kept, the last at the end. A thread that ends without freeing it leaks it.
    static KEPT: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
}

/// `Box::leak`, but [`free_all`] finds it again.
pub fn keep<T: ?Sized + 'static>(value: Box<T>) -> &'static T {
    let value = Box::into_raw(value);
    // SAFETY: the pointer came from this box, and the closure runs once.
    let free = move || drop(unsafe { Box::from_raw(value) });
    KEPT.with_borrow_mut(|kept| kept.push(Box::new(free)));
    // SAFETY: the value lives until `free_all`, whose caller vouches that no reference is used afterwards.
    unsafe { &*value }
}

/// Frees all that this thread kept, the last first: what was made of others goes before them.
///
/// # Safety
///
/// No reference that [`keep`] gave on this thread is used from now on, and nothing that was made with one is dropped.
pub unsafe fn free_all() {
    while let Some(free) = KEPT.with_borrow_mut(Vec::pop) {
        free();
    }
}
