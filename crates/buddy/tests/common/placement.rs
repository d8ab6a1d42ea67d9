//! The world's calls about nodes and CPUs: where a request is served, which CPU makes it, which CPUs are there.
#![allow(dead_code)]

use kmem_hal::{
    AllocError, Cpu, CpuId, FrameRange, FrameRequest, FrameSource, Mobility, NodeId, NodePolicy,
    Order,
};

use super::hands::Hand;
use super::layout::{END, NODES, node_of};
use super::played::{Played, become_cpu};
use super::world::{CPUS, Need, World};

/// The policies by number; there is one node more than there is memory of.
fn policy_of(number: u8) -> NodePolicy {
    let node = NodeId::new(u16::from(number / 4) % (NODES + 1));
    match number % 4 {
        0 => NodePolicy::Preferred(node),
        1 => NodePolicy::Strict(node),
        2 => NodePolicy::Interleave,
        _ => NodePolicy::Local,
    }
}

impl World<'_> {
    /// Allocates by a policy, with all arrays empty so that the model knows what each node can give.
    pub(super) fn alloc_on_node(&mut self, policy: u8, order: Order, mobility: Mobility) {
        let policy = policy_of(policy);
        let request = FrameRequest::new(order).mobility(mobility).node(policy);
        self.buddy.drain_all();
        let first = self.alloc_by(&request);
        if policy == NodePolicy::Interleave && self.has_arrays(self.cpu()) {
            self.buddy.drain_all();
            let other = first.map(|node| NodeId::new(1 - node.get()));
            let due = !self.calls.is_deaf() && self.is_possible_at(&request, other);
            let second = self.alloc_by(&request);
            assert!(second == other || !due, "{first:?}, then {second:?}");
        }
    }

    /// Whether a node, or any where none is named, can serve a request.
    fn is_possible_at(&self, request: &FrameRequest, node: Option<NodeId>) -> bool {
        let frames = request.order.frames();
        let need = Need::new(frames, frames, request.mobility);
        self.possible(&Need { node, ..need })
    }

    /// One allocation; the node that served it.
    fn alloc_by(&mut self, request: &FrameRequest) -> Option<NodeId> {
        let here = self.buddy.node_of_cpu(self.cpu());
        let wanted = match request.node {
            NodePolicy::Preferred(node) if node.get() < NODES => Some(node),
            NodePolicy::Local | NodePolicy::Preferred(_) => Some(here),
            NodePolicy::Strict(node) => Some(node),
            NodePolicy::Interleave => None,
        };
        let strict = matches!(request.node, NodePolicy::Strict(_));
        let possible = self.is_possible_at(request, wanted);
        match self.buddy.alloc(request) {
            Ok(frame) => {
                let node = self.buddy.node_of_frame(frame.first());
                assert_eq!(node, node_of(frame.first().number()));
                let elsewhere = wanted.is_some_and(|wanted| wanted != node);
                let fell_back = !strict && (!possible || self.calls.is_deaf());
                assert!(!elsewhere || fell_back, "{request:?} from node {node}");
                self.granted(frame, request.mobility);
                Some(node)
            }
            Err(error) => {
                let frames = request.order.frames();
                let node = wanted.filter(|_| strict);
                let need = Need::new(frames, frames, request.mobility);
                self.refused(error, &Need { node, ..need });
                None
            }
        }
    }

    /// The CPU that makes the calls.
    fn cpu(&self) -> CpuId {
        Played::<CPUS>.id(&())
    }

    fn has_arrays(&self, cpu: CpuId) -> bool {
        self.with_arrays.contains(cpu)
    }

    /// Goes on at a CPU, if that is online.
    pub(super) fn go_to(&self, cpu: u8) {
        let cpu = CpuId::new(u32::from(cpu) % CPUS);
        if !self.calls.offline().contains(cpu) {
            become_cpu(cpu.get());
        }
    }

    /// A CPU other than this one goes offline: nothing stays in its arrays.
    pub(super) fn offline(&mut self, cpu: u8) {
        let cpu = CpuId::new(u32::from(cpu) % CPUS);
        if cpu == self.cpu() {
            return;
        }
        let mut offline = self.calls.offline();
        offline.insert(cpu);
        self.calls.set_offline(offline);
        // SAFETY: the thread plays other CPUs until this one is online again, and calls do not reach it.
        assert!(unsafe { self.buddy.cpu_offline(cpu) });
        let deaf = self.calls.set_deaf(false);
        assert!(self.buddy.drain_all());
        self.calls.set_deaf(deaf);
        assert_eq!(self.buddy.mem_info().cached, 0, "{cpu:?} kept frames");
    }

    /// A CPU comes online, with arrays that it kept or gets now.
    pub(super) fn online(&mut self, cpu: u8) {
        let cpu = CpuId::new(u32::from(cpu) % (CPUS + 1));
        match self.buddy.cpu_online(cpu) {
            Ok(()) if self.has_arrays(cpu) => {}
            Ok(()) => {
                let range = self.lost_block();
                self.hand_out(range, Hand::Arrays);
                self.area_frames = range.count();
                self.with_arrays.insert(cpu);
            }
            Err(AllocError::Unsatisfiable) if cpu.get() >= CPUS => return,
            Err(error) => {
                assert!(!self.has_arrays(cpu));
                let frames = self.area_frames;
                self.refused(error, &Need::new(frames, frames, Mobility::Unmovable));
            }
        }
        let mut offline = self.calls.offline();
        offline.remove(cpu);
        self.calls.set_offline(offline);
    }

    /// The block that the allocator keeps since the last call although the model has it free; there is one, and only one.
    fn lost_block(&self) -> FrameRange {
        let deaf = self.calls.set_deaf(false);
        let now = self.buddy.recount();
        let lost = self.free() - now.free - now.cached;
        assert!(lost.is_power_of_two(), "{lost} frames for a CPU's arrays");
        let places = (0..END).step_by(lost as usize);
        let places = places.filter_map(|at| FrameRange::from_numbers(at, at + lost));
        let mut kept = places.filter(|&range| {
            let free = self.is_free(range.first().number(), range.end_number());
            if !free || self.is_lent(range) {
                return false;
            }
            match self.buddy.alloc_range_at(range) {
                Ok(range) => self.buddy.free_range(range).is_err(),
                Err(_) => true,
            }
        });
        let range = kept.next().unwrap();
        assert_eq!(kept.next(), None);
        self.calls.set_deaf(deaf);
        range
    }
}
