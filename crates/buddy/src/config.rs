//! What a kernel may choose about its zones.

use kmem_hal::{CpuId, NodeId};

use crate::zone::kind::ZoneLimits;

/// The choices; every one has a default.
///
/// # Examples
///
/// ```
/// use kmem_buddy::{Config, ZoneLimits};
///
/// let config = Config::new().limits(ZoneLimits::X86_32).cpus(4);
/// # let _ = config;
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub(crate) limits: ZoneLimits,
    pub(crate) cpus: u32,
    pub(crate) distance: fn(NodeId, NodeId) -> u8,
    pub(crate) cpu_node: fn(CpuId) -> NodeId,
    pub(crate) min_free_kib: Option<u64>,
    pub(crate) reserve_ratio: [u32; 5],
}

impl Config {
    /// x86-64's zones, all CPUs online, nodes equally far, watermarks as Linux computes them.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            limits: ZoneLimits::X86_64,
            cpus: u32::MAX,
            distance: flat,
            cpu_node: first_node,
            min_free_kib: None,
            reserve_ratio: [256, 256, 32, 0, 0],
        }
    }

    /// Where zones end.
    #[must_use]
    pub const fn limits(mut self, limits: ZoneLimits) -> Self {
        self.limits = limits;
        self
    }

    /// How many CPUs are online at `init` (0..n); the others join with `cpu_online`.
    #[must_use]
    pub const fn cpus(mut self, online: u32) -> Self {
        self.cpus = online;
        self
    }

    /// How far nodes are from each other (SLIT: 10 is local).
    #[doc(alias = "node_distance")]
    #[must_use]
    pub const fn distance(mut self, distance: fn(NodeId, NodeId) -> u8) -> Self {
        self.distance = distance;
        self
    }

    /// Which node a CPU belongs to.
    #[doc(alias = "cpu_to_node")]
    #[must_use]
    pub const fn cpu_node(mut self, node: fn(CpuId) -> NodeId) -> Self {
        self.cpu_node = node;
        self
    }

    /// KiB that the min watermarks keep free together; by default Linux's 4 * sqrt(KiB of low memory).
    ///
    /// 0 turns watermarks off: the last frame can be had.
    #[doc(alias = "min_free_kbytes")]
    #[must_use]
    pub const fn min_free_kib(mut self, kib: u64) -> Self {
        self.min_free_kib = Some(kib);
        self
    }

    /// For each zone kind, which part of the memory above it is kept from requests that could use that memory: 1/n; 0 is none.
    #[doc(alias = "lowmem_reserve_ratio")]
    #[must_use]
    pub const fn reserve_ratio(mut self, ratio: [u32; 5]) -> Self {
        self.reserve_ratio = ratio;
        self
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::new()
    }
}

fn flat(from: NodeId, to: NodeId) -> u8 {
    if from == to { 10 } else { 20 }
}

fn first_node(_cpu: CpuId) -> NodeId {
    NodeId::ZERO
}
