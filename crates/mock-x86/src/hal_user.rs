//! hal's `UserAccess` on the machine, and the retry of a faulting access by a handler.
//!
//! A copy is made with the user's own rights at CPL 3 (stricter than a real kernel's STAC, and what contract `U1` asks for), byte by byte
//! resumable: a fault goes to the handler, and the copy goes on behind what it has copied.

use kmem_hal::{FaultCode, PageFault, UserAccess, UserFault, VirtAddr};

use crate::cpu::Fault;
use crate::machine::Machine;
use crate::vcpu::VirtualCpu;

/// How often one address may fault in a row although the handler says that it has resolved the fault.
const MOST_RETRIES: usize = 64;

/// User memory of whatever space the current CPU has loaded, with a page-fault handler.
#[derive(Debug, Clone, Copy)]
pub struct MachineUser<'m, H> {
    machine: &'m Machine,
    handler: H,
}

impl<'m, H: Fn(PageFault) -> bool> MachineUser<'m, H> {
    /// Copies through `machine`; `handler` resolves a page fault, or answers `false` to let the copy fail.
    pub fn new(machine: &'m Machine, handler: H) -> Self {
        Self { machine, handler }
    }

    /// Runs `access` again and again until it succeeds, or faults in a way that the handler refuses.
    ///
    /// `access` gets the bytes done so far and answers how many were done before a fault.
    fn retry(
        &self,
        base: VirtAddr,
        mut access: impl FnMut(VirtualCpu<'m>, usize) -> Result<(), (usize, Fault)>,
    ) -> Result<(), UserFault> {
        let cpu = self.machine.cpu(self.machine.current_cpu()).user();
        let mut copied = 0;
        let mut retries = 0;
        loop {
            let Err((more, fault)) = access(cpu, copied) else {
                return Ok(());
            };
            copied += more;
            retries = if more > 0 { 0 } else { retries + 1 };
            let resolved = match fault {
                Fault::Page { .. } if retries < MOST_RETRIES => {
                    page_fault(fault).is_some_and(|fault| (self.handler)(fault))
                }
                _ => false,
            };
            if !resolved {
                let address = VirtAddr::new(base.as_u64().wrapping_add(copied as u64));
                return Err(UserFault { address, copied });
            }
        }
    }
}

/// A page fault in hal's words; `None` for other faults.
pub(crate) fn page_fault(fault: Fault) -> Option<PageFault> {
    match fault {
        Fault::Page { address, code } => Some(PageFault {
            address: VirtAddr::new(address),
            code: FaultCode::from_bits_retain(code),
        }),
        _ => None,
    }
}

impl Fault {
    /// The fault in hal's words; `None` if it is no page fault.
    pub fn as_page_fault(self) -> Option<PageFault> {
        page_fault(self)
    }
}

// SAFETY: U1: the accesses are user accesses of the mock MMU; U2: an unresolved fault returns at once.
unsafe impl<H: Fn(PageFault) -> bool> UserAccess for MachineUser<'_, H> {
    fn copy_from_user(&self, to: &mut [u8], from: VirtAddr) -> Result<(), UserFault> {
        self.retry(from, |cpu, done| {
            cpu.read(from.as_u64().wrapping_add(done as u64), &mut to[done..])
        })
    }

    fn copy_to_user(&self, to: VirtAddr, from: &[u8]) -> Result<(), UserFault> {
        self.retry(to, |cpu, done| {
            cpu.write(to.as_u64().wrapping_add(done as u64), &from[done..])
        })
    }
}
