//! The learning rate as a pure function of the step.

use super::config::{OptimizerSection, Schedule};

/// The learning rate of update `step`, which counts 1, 2, ... `steps`.
///
/// Warm-up is linear from 0 (at the step 0 that no update has) to `lr` at step `warmup_steps`; the decay runs from
/// there to step `steps`, and beyond it the rate stays where the decay ended.
pub fn learning_rate(optimizer: &OptimizerSection, steps: u64, step: u64) -> f64 {
    let &OptimizerSection { lr, warmup_steps, min_lr_ratio, schedule, .. } = optimizer;
    if step < warmup_steps {
        return lr * step as f64 / warmup_steps as f64;
    }
    // A run that ends with its warm-up has no decay: its last step is the peak.
    let progress = if steps > warmup_steps {
        ((step - warmup_steps) as f64 / (steps - warmup_steps) as f64).min(1.0)
    } else {
        0.0
    };
    let remaining = match schedule {
        Schedule::Constant => 1.0,
        Schedule::Linear => 1.0 - progress,
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
    };
    lr * (min_lr_ratio + (1.0 - min_lr_ratio) * remaining)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn optimizer(schedule: Schedule, warmup_steps: u64, min_lr_ratio: f64) -> OptimizerSection {
        OptimizerSection { lr: 2.0, schedule, warmup_steps, min_lr_ratio, ..Default::default() }
    }

    fn course(o: &OptimizerSection, steps: u64) -> Vec<f64> {
        (0..=steps + 1).map(|s| learning_rate(o, steps, s)).collect()
    }

    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-12, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn warm_up_is_linear_from_zero_and_reaches_lr_at_its_last_step() {
        assert_close(
            &course(&optimizer(Schedule::Constant, 4, 0.1), 5),
            &[0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0],
        );
    }

    #[test]
    fn decays_end_at_the_minimum_on_the_last_step_and_stay_there() {
        assert_close(
            &course(&optimizer(Schedule::Linear, 1, 0.5), 5),
            &[0.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0],
        );
        let h = std::f64::consts::FRAC_1_SQRT_2;
        let at = |c: f64| 2.0 * (0.2 + 0.8 * 0.5 * (1.0 + c));
        assert_close(
            &course(&optimizer(Schedule::Cosine, 1, 0.2), 5),
            &[0.0, at(1.0), at(h), at(0.0), at(-h), 0.4, 0.4],
        );
    }

    #[test]
    fn without_warm_up_the_first_update_is_one_step_down_the_decay() {
        assert_close(&course(&optimizer(Schedule::Linear, 0, 0.0), 4), &[2.0, 1.5, 1.0, 0.5, 0.0, 0.0]);
        assert_close(&course(&optimizer(Schedule::Constant, 0, 0.0), 2), &[2.0; 4]);
    }

    #[test]
    fn a_run_that_is_all_warm_up_ends_at_the_peak() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            assert_close(&course(&optimizer(schedule, 2, 0.0), 2), &[0.0, 1.0, 2.0, 2.0]);
        }
    }
}
