//! `fence` and `membar`.

use super::operands::{Scope, scope};
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::race::Releases;
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Space;

/// `fence` and `membar`.
#[derive(Debug)]
struct Fence {
    /// Which other blocks are meant.
    scope: Scope,
}

/// Of a fence for objects in shared memory alone (`sync_restrict`): the clocks of the cluster's warps order these, and what
/// blocks know of each other's accesses to global memory stays as it is.
const SHARED: Scope = Scope { gpu: false, cluster: false };

pub(super) fn fence(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let missing = || invalid(format!("`{written}` names no scope"));
    let gpu = Scope { gpu: true, cluster: true };
    let scope = if inst.opcode == "membar" {
        let scopes = [("cta", Scope::default()), ("gl", gpu), ("sys", gpu)];
        mods.one_of(&scopes).ok_or_else(missing)?
    } else if mods.one_of(&[("proxy", ())]).is_some() {
        let rest: Vec<_> = std::iter::from_fn(|| mods.any()).collect();
        match rest.join(".").as_str() {
            // Virtual aliases are one address here; and what copies store to global memory is not followed.
            "alias" | "async.global" => {}
            "async" | "async.shared::cta" | "async.shared::cluster" => {
                _ = d.warp(ProxyFence, Class::Sync, &[], &[]);
            }
            // Of what the cluster's warps store to shared memory and its copies touch there: both a fence of the proxy and one
            // between warps.
            "async::generic.acquire.sync_restrict::shared::cluster.cluster"
            | "async::generic.release.sync_restrict::shared::cta.cluster" => {
                _ = d.warp(ProxyFence, Class::Sync, &[], &[]);
                _ = d.warp(Fence { scope: SHARED }, Class::Sync, &[], &[]);
            }
            text => {
                let ordered = text.strip_prefix("tensormap::generic.");
                let scope = match ordered.and_then(|o| o.split_once('.')) {
                    Some(("acquire" | "release", scope)) => match scope {
                        "cta" => Scope::default(),
                        "cluster" => Scope { gpu: false, cluster: true },
                        "gpu" | "sys" => gpu,
                        _ => return Err(unsupported(format!("`{written}`"))),
                    },
                    _ => return Err(unsupported(format!("`{written}`"))),
                };
                // An acquire names the map, which does not matter to a fence of everything.
                if text.contains("acquire") {
                    let [at, Operand::Integer(128)] = operands(inst)? else {
                        return Err(invalid(format!("`{written}` takes an address, and 128")));
                    };
                    d.address(at, Space::Generic)?;
                } else {
                    operands::<0>(inst)?;
                }
                d.warp(Fence { scope }, Class::Sync, &[], &[]);
                return Ok(());
            }
        }
        operands::<0>(inst)?;
        return Ok(());
    } else if mods.take("mbarrier_init") {
        if !mods.take("release") || !mods.take("cluster") {
            return Err(invalid(format!("`{written}`: it is fence.mbarrier_init.release.cluster")));
        }
        Scope { gpu: false, cluster: true }
    } else {
        let orders = [
            ("sc", None),
            ("acq_rel", None),
            ("acquire", Some("sync_restrict::shared::cluster")),
            ("release", Some("sync_restrict::shared::cta")),
        ];
        let shared = mods.one_of(&orders).flatten().is_some_and(|restriction| mods.take(restriction));
        match scope(&mut mods).ok_or_else(missing)? {
            Scope { gpu: false, cluster: true } if shared => SHARED,
            _ if shared => return Err(invalid(format!("`{written}`: its scope is cluster"))),
            scope => scope,
        }
    };
    mods.finish()?;
    operands::<0>(inst)?;
    d.warp(Fence { scope }, Class::Sync, &[], &[]);
    Ok(())
}

/// `fence.proxy.async` of shared memory: bulk copies that the fence is ordered before see what was stored before it.
#[derive(Debug)]
struct ProxyFence;

impl WarpOp for ProxyFence {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, _mask: u32) -> Result<(), Stop> {
        if ctx.launch.checks.race {
            ctx.block.clocks.proxy_fence(ctx.warp.id);
        }
        Ok(())
    }
}

impl WarpOp for Fence {
    fn execute(&self, ctx: &mut Context<'_>, _inst: &Inst, _mask: u32) -> Result<(), Stop> {
        if ctx.launch.checks.race {
            ctx.block.clocks.fence(ctx.warp.id);
            if self.scope.gpu || self.scope.cluster && ctx.block.cluster.is_some() {
                Releases::fence(&mut ctx.block.epochs);
            }
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }
}
