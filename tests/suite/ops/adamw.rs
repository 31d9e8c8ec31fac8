use bon_engine::backend::AdamW;
use bon_engine::backend::cpu::adamw::step;
use bon_engine::backend::cpu::{Data, Tensor};
use half::bf16;

use super::{random, randoms, same_everywhere, wide};
use crate::tolerance::{EPS, assert_within};

const WEIGHT_DECAY: f32 = 0.1;

fn hyper(step: u64) -> AdamW {
    AdamW { lr: 3e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step, grad_scale: 0.37 }
}

#[test]
fn five_steps_agree_with_the_formula() {
    for n in (1..=40).chain([70_000]) {
        const STEPS: u64 = 5;
        let start = random(1, 1, n);
        let grads: Vec<Tensor> = (0..STEPS).map(|t| random(10 + t as u32, 1, n)).collect();
        let out = same_everywhere(|| {
            let (mut p, mut m, mut v) =
                (start.clone(), Tensor::f32(1, n, vec![0.0; n]), Tensor::f32(1, n, vec![0.0; n]));
            let mut copy = Tensor::new(1, n, Data::Bf16(vec![bf16::ZERO; n]));
            for (t, g) in (1..).zip(&grads) {
                step(&hyper(t), WEIGHT_DECAY, g, &mut p, &mut m, &mut v, Some(&mut copy));
            }
            vec![p, m, v, copy]
        });
        let h = hyper(1);
        let (lr, b1, b2) = (f64::from(h.lr), f64::from(h.beta1), f64::from(h.beta2));
        let (mut p, mut m, mut v) = (wide(&start), vec![0.0; n], vec![0.0; n]);
        for (t, g) in (1..).zip(&grads) {
            for (i, g) in wide(g).into_iter().enumerate() {
                let g = g * f64::from(h.grad_scale);
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let root = (v[i] / (1.0 - b2.powi(t))).sqrt() + f64::from(h.eps);
                p[i] -= lr * f64::from(WEIGHT_DECAY) * p[i] + lr * m[i] / (1.0 - b1.powi(t)) / root;
            }
        }
        // |g| <= 0.37, so |m| <= 0.37 and v <= 0.37^2; a handful of roundings per step.
        assert_within("m", out[1].as_f32(), &m, |_| 3.0 * STEPS as f64 * EPS * 0.37);
        assert_within("v", out[2].as_f32(), &v, |i| 3.0 * STEPS as f64 * EPS * v[i]);
        // An update is at most about lr * sqrt(steps) (m and v see the same gradients), its error comes from m above.
        assert_within("p", out[0].as_f32(), &p, |i| {
            let update_error = lr * 15.0 * EPS * 0.37 / v[i].sqrt();
            STEPS as f64 * (EPS + 6.0 * EPS * lr * 2.3 + update_error)
        });
        let Data::Bf16(copy) = out[3].data() else { panic!("the copy changed its dtype") };
        assert!(copy.iter().zip(out[0].as_f32()).all(|(c, &p)| *c == bf16::from_f32(p)));
    }
}

/// torch.optim.AdamW (2.x, float32), lr 0.01, betas (0.9, 0.999), eps 1e-8, weight_decay 0.01: three steps.
#[test]
fn agrees_with_pytorch() {
    let mut p = Tensor::f32(1, 3, vec![1.0, -0.5, 0.25]);
    let (mut m, mut v) = (Tensor::f32(1, 3, vec![0.0; 3]), Tensor::f32(1, 3, vec![0.0; 3]));
    for (t, g) in [[0.1, -2.0, 1e-4], [0.3, 1.0, -1e-4], [-0.2, 0.5, 3e-4]].into_iter().enumerate() {
        let hyper =
            AdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, step: t as u64 + 1, grad_scale: 1.0 };
        step(&hyper, 0.01, &Tensor::f32(1, 3, g.to_vec()), &mut p, &mut m, &mut v, None);
    }
    let want = [0.9779461026191711, -0.48657500743865967, 0.2348487824201584];
    // PyTorch rounds as often as we do, in another order: a few units of the update beside p's own rounding.
    assert_within("p", p.as_f32(), &want, |i| 2.0 * EPS * want[i].abs() + 20.0 * EPS * 0.01);
}

#[test]
fn a_gradient_scale_is_a_scaled_gradient() {
    let n = 33;
    let g = randoms(5, n);
    let run = |grad_scale: f32, g: Vec<f32>| {
        let zeros = || Tensor::f32(1, n, vec![0.0; n]);
        let (mut p, mut m, mut v) = (random(6, 1, n), zeros(), zeros());
        let hyper = AdamW { grad_scale, ..hyper(1) };
        step(&hyper, WEIGHT_DECAY, &Tensor::f32(1, n, g), &mut p, &mut m, &mut v, None);
        (p, m, v)
    };
    assert_eq!(run(0.25, g.clone()), run(1.0, g.iter().map(|g| 0.25 * g).collect()));
}
