//! An environment is a promise about real hardware: implementing it is `unsafe`.
//~ error[E0200]
//~ the trait `Env` requires an `unsafe impl` declaration
use kmem_paging::Env;

struct Mine;

impl Env for Mine {}

fn main() {}
