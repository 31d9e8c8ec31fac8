//! The control-flow graph of a function: basic blocks, and where lanes that parted meet again.

use crate::machine::inst::{Control, Exec, Inst};

/// A basic block: instructions `start..end`, and the blocks that may run next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// First instruction.
    pub start: usize,
    /// Behind the last instruction.
    pub end: usize,
    /// Blocks that may follow; none where the function ends.
    pub next: Vec<usize>,
}

/// A function's blocks in the order of its text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The blocks; block 0 is the entry.
    pub blocks: Vec<Block>,
    of_inst: Vec<u32>,
}

/// The targets of a branch: instruction indices.
pub fn targets(inst: &Inst) -> &[u32] {
    match &inst.exec {
        Exec::Control(Control::Branch { target, .. }) => std::slice::from_ref(target),
        Exec::Control(Control::BranchTable { targets, .. }) => targets,
        _ => &[],
    }
}

/// Whether an instruction is a call that only some lanes make, or that may enter several functions: the lanes meet
/// again behind it.
pub fn parting_call(inst: &Inst) -> bool {
    match &inst.exec {
        Exec::Control(Control::CallIndirect { .. }) => true,
        Exec::Control(Control::Call { .. }) => inst.guard.is_some(),
        _ => false,
    }
}

/// Whether control never goes on to the next instruction.
fn leaves(inst: &Inst) -> bool {
    inst.guard.is_none()
        && matches!(
            inst.exec,
            Exec::Control(
                Control::Branch { .. }
                    | Control::BranchTable { .. }
                    | Control::Return
                    | Control::Exit
                    | Control::Trap
            )
        )
}

impl Flow {
    /// The graph of `code`, whose branch targets are indices into it, and which ends in an instruction that leaves.
    pub fn new(code: &[Inst]) -> Self {
        let mut leader = vec![false; code.len() + 1];
        leader[0] = true;
        for (i, inst) in code.iter().enumerate() {
            if matches!(&inst.exec, Exec::Control(_)) {
                targets(inst).iter().for_each(|t| leader[*t as usize] = true);
                if leaves(inst) || !targets(inst).is_empty() || parting_call(inst) {
                    leader[i + 1] = true;
                }
            }
        }
        let starts: Vec<usize> = (0..code.len()).filter(|i| leader[*i]).collect();
        let mut of_inst = vec![0; code.len()];
        let mut blocks = Vec::with_capacity(starts.len());
        for (b, &start) in starts.iter().enumerate() {
            let end = starts.get(b + 1).copied().unwrap_or(code.len());
            of_inst[start..end].fill(b as u32);
            blocks.push(Block { start, end, next: Vec::new() });
        }
        let count = blocks.len();
        for (b, block) in blocks.iter_mut().enumerate() {
            let last = &code[block.end - 1];
            block.next.extend(targets(last).iter().map(|t| of_inst[*t as usize] as usize));
            if !leaves(last) && b + 1 < count {
                block.next.push(b + 1);
            }
            block.next.sort_unstable();
            block.next.dedup();
        }
        Self { blocks, of_inst }
    }

    /// The block of an instruction.
    pub fn block_of(&self, inst: usize) -> usize {
        self.of_inst[inst] as usize
    }

    /// The immediate post-dominator of each block, where there is one: the first block that every way from it to the
    /// function's end passes. (Cooper, Harvey, Kennedy: "A Simple, Fast Dominance Algorithm", on the reversed graph.)
    pub fn post_dominators(&self) -> Vec<Option<usize>> {
        let n = self.blocks.len();
        let exit = n;
        // The reversed graph: from the exit over `before` to the entry.
        let mut before = vec![Vec::new(); n + 1];
        for (b, block) in self.blocks.iter().enumerate() {
            if block.next.is_empty() {
                before[exit].push(b);
            }
            block.next.iter().for_each(|t| before[*t].push(b));
        }
        // Post-order of the reversed graph, without recursion: functions may be long.
        let mut order = Vec::with_capacity(n + 1);
        let mut number = vec![usize::MAX; n + 1];
        let mut seen = vec![false; n + 1];
        let mut stack = vec![(exit, 0)];
        seen[exit] = true;
        while let Some((node, child)) = stack.pop() {
            if let Some(&next) = before[node].get(child) {
                stack.push((node, child + 1));
                if !seen[next] {
                    seen[next] = true;
                    stack.push((next, 0));
                }
            } else {
                number[node] = order.len();
                order.push(node);
            }
        }
        let mut dom = vec![usize::MAX; n + 1];
        dom[exit] = exit;
        let mut changed = true;
        while changed {
            changed = false;
            for &node in order.iter().rev().filter(|b| **b != exit) {
                let next = &self.blocks[node].next;
                let ways = if next.is_empty() { std::slice::from_ref(&exit) } else { next };
                let mut new = usize::MAX;
                for &way in ways.iter().filter(|w| dom[**w] != usize::MAX) {
                    new = if new == usize::MAX { way } else { meet(&dom, &number, new, way) };
                }
                if new != usize::MAX && dom[node] != new {
                    dom[node] = new;
                    changed = true;
                }
            }
        }
        (0..n).map(|b| Some(dom[b]).filter(|d| *d < n)).collect()
    }
}

/// The nearest common post-dominator of two nodes.
fn meet(dom: &[usize], number: &[usize], mut a: usize, mut b: usize) -> usize {
    while a != b {
        while number[a] < number[b] {
            a = dom[a];
        }
        while number[b] < number[a] {
            b = dom[b];
        }
    }
    a
}
