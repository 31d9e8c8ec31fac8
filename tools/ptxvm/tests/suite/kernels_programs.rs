//! science.cu and calls.cu.

use crate::kernels::{BUILDS, DEBUG, Device, Rng, SM80, SM90, U32, U64, near};

#[test]
fn nbody() {
    for build in BUILDS {
        let n = 150usize;
        let mut d = Device::new("science.cu", build);
        let x = Rng(61).f32s(4 * n);
        let (a, b) = (d.upload(&x), d.empty::<f32>(4 * n));
        d.run_shared("nbody", 3, 64, 64 * 16, &[&a, &b, &(n as i32), &0.05f32]);
        let got = d.download::<f32>(b, 4 * n);
        let at = |i: usize, c: usize| f64::from(x[4 * i + c]);
        for i in 0..n {
            let (mut sum, mut size) = ([0.0; 3], [0.0; 3]);
            for j in 0..n {
                let r: Vec<f64> = (0..3).map(|c| at(j, c) - at(i, c)).collect();
                let f = at(j, 3) * (r.iter().map(|v| v * v).sum::<f64>() + f64::from(0.05f32)).powf(-1.5);
                (0..3).for_each(|c| {
                    sum[c] += r[c] * f;
                    size[c] += (r[c] * f).abs();
                });
            }
            for c in 0..3 {
                // 192 additions, and 16 roundings inside each term; rsqrt is good to 2 units.
                near(f64::from(got[4 * i + c]), sum[c], (192.0 + 16.0) * U32 * size[c], (build, i, c));
            }
        }
    }
}

#[test]
fn convolution() {
    for build in BUILDS {
        let (w, h) = (37usize, 21usize);
        let mut d = Device::new("science.cu", build);
        let x = Rng(62).f32s(w * h);
        let (a, b) = (d.upload(&x), d.empty::<f32>(w * h));
        d.run("convolveILi3", (3, 2), (16, 16), &[&a, &b, &(w as i32), &(h as i32)]);
        let pixel = |px: i64, py: i64| {
            let (px, py) = (px.clamp(0, w as i64 - 1) as usize, py.clamp(0, h as i64 - 1) as usize);
            f64::from(x[py * w + px])
        };
        let row = [1.0, 6.0, 15.0, 20.0, 15.0, 6.0, 1.0];
        for (i, got) in d.download::<f32>(b, w * h).into_iter().enumerate() {
            let (px, py) = ((i % w) as i64, (i / w) as i64);
            let corner = [(-3, -3), (3, -3), (-3, 3), (3, 3)][((px ^ py) & 3) as usize];
            let mut want = -pixel(px + corner.0, py + corner.1);
            for (r, a) in row.iter().enumerate() {
                for (s, b) in row.iter().enumerate() {
                    want += a * b * pixel(px + s as i64 - 3, py + r as i64 - 3);
                }
            }
            near(f64::from(got), want, 51.0 * U32 * 4097.0, (build, i));
        }
    }
}

#[test]
fn mandelbrot() {
    // Which products the compiler fuses changes the orbits of the few points that graze the border.
    let steps = |cx: f64, cy: f64, limit: i32| {
        let (mut x, mut y) = (0.0, 0.0);
        for i in 0..limit {
            if x * x + y * y > 4.0 {
                return i;
            }
            (x, y) = (x * x - y * y + cx, 2.0 * x * y + cy);
        }
        limit
    };
    for build in BUILDS {
        let mut d = Device::new("science.cu", build);
        let (w, h, limit) = (45usize, 31usize, 60);
        let out = d.empty::<i32>(w * h);
        d.run("mandelbrotId", (3, 4), (16, 8), &[&out, &45i32, &31i32, &-2.0f64, &-1.1f64, &0.07f64, &limit]);
        let double = d.download::<i32>(out, w * h);
        d.run("mandelbrotIf", (3, 4), (16, 8), &[&out, &45i32, &31i32, &-2.0f32, &-1.1f32, &0.07f32, &limit]);
        let single = d.download::<i32>(out, w * h);
        let want: Vec<i32> = (0..w * h)
            .map(|i| steps(-2.0 + (i % w) as f64 * 0.07, -1.1 + (i / w) as f64 * 0.07, limit))
            .collect();
        let differ = |got: &[i32]| got.iter().zip(&want).filter(|(a, b)| a != b).count();
        assert!(differ(&double) <= w * h / 200, "{build:?}: {} differ", differ(&double));
        assert!(differ(&single) <= w * h / 50, "{build:?}: {} differ", differ(&single));
    }
}

#[test]
fn jacobi_and_spmv() {
    for build in BUILDS {
        let mut d = Device::new("science.cu", build);
        let mut rng = Rng(63);
        let (w, h) = (37usize, 19usize);
        let mut x = rng.vec(w * h, Rng::f64);
        x[..w * 9].fill(0.25); // a part that does not move
        let (a, b, m) = (d.upload(&x), d.empty::<f64>(w * h), d.upload(&[0i32; 3]));
        d.run("jacobi", (3, 3), (16, 8), &[&a, &b, &m, &(w as i32), &(h as i32), &1e-9f64]);
        let (mut want, mut moved) = (x.clone(), vec![false; w * h]);
        for (py, px) in (1..h - 1).flat_map(|y| (1..w - 1).map(move |x| (y, x))) {
            let i = py * w + px;
            want[i] = 0.25 * (x[i - 1] + x[i + 1] + x[i - w] + x[i + w]);
            moved[i] = (want[i] - x[i]).abs() > 1e-9;
        }
        assert_eq!(d.download::<f64>(b, w * h), want, "{build:?}");
        let blocks = (0..9).map(|b| {
            let cells = (0..128).map(|t| (b % 3 * 16 + t % 16, b / 3 * 8 + t / 16));
            cells.map(|(x, y)| x < w && y < h && moved[y * w + x]).collect::<Vec<_>>()
        });
        let sums = blocks.fold([0i32; 3], |s, cells| {
            let count = cells.iter().filter(|m| **m).count();
            [s[0] + count as i32, s[1] + i32::from(count > 0), s[2] + i32::from(count == 128)]
        });
        assert_eq!(d.download::<i32>(m, 3), sums, "{build:?}");

        let (rows, cols) = (23usize, 200usize);
        let lengths = rng.vec(rows, |r| r.below(90));
        let mut starts = vec![0i32];
        lengths.iter().for_each(|l| starts.push(starts.last().unwrap() + *l as i32));
        let all: usize = lengths.iter().sum();
        let columns = rng.vec(all, |r| r.below(cols as u64) as i32);
        let (values, x) = (rng.vec(all, Rng::f64), rng.vec(cols, Rng::f64));
        let (s, c, v, xs) = (d.upload(&starts), d.upload(&columns), d.upload(&values), d.upload(&x));
        let y = d.empty::<f64>(rows);
        d.run("spmv_csr", rows.div_ceil(4), 128, &[&(rows as i32), &s, &c, &v, &xs, &y]);
        for (r, got) in d.download::<f64>(y, rows).into_iter().enumerate() {
            let terms: Vec<f64> = (starts[r] as usize..starts[r + 1] as usize)
                .map(|i| values[i] * x[columns[i] as usize])
                .collect();
            near(got, terms.iter().sum(), 2.0 * 90.0 * U64 * 90.0, (build, r));
        }
    }
}

fn ackermann(m: u64, n: u64) -> u64 {
    match (m, n) {
        (0, n) => n + 1,
        (m, 0) => ackermann(m - 1, 1),
        (m, n) => ackermann(m - 1, ackermann(m, n - 1)),
    }
}

#[test]
fn recursion() {
    for build in BUILDS {
        let mut d = Device::new("calls.cu", build);
        let out = d.empty::<u64>(80);
        d.run("recursion", 2, 40, &[&out]);
        let want: Vec<u64> = (0..80).map(|i| ackermann(i % 40 % 3, i % 40 % 7)).collect();
        assert_eq!(d.download::<u64>(out, 80), want, "{build:?}");

        let (runs, length) = (40usize, 25usize);
        let mut x = Rng(64).vec(runs * length, |r| r.below(50) as i32);
        let a = d.upload(&x);
        d.run("quicksort_runs", 2, 32, &[&a, &(runs as i32), &(length as i32)]);
        x.chunks_mut(length).for_each(<[i32]>::sort_unstable);
        assert_eq!(d.download::<i32>(a, x.len()), x, "{build:?}");
    }
}

#[test]
fn indirect_calls() {
    for build in BUILDS {
        let mut d = Device::new("calls.cu", build);
        let mut rng = Rng(65);
        let (x, which) = (rng.f32s(100), rng.vec(100, |r| r.u32() as i32));
        let (a, w, b) = (d.upload(&x), d.upload(&which), d.empty::<f32>(100));
        d.run("function_pointers", 2, 64, &[&a, &w, &b, &100i32]);
        let call = |(x, w): (&f32, &i32)| [x + x, x * x, -x, 1.0 / x][(w & 3) as usize];
        assert_eq!(
            d.download::<f32>(b, 100),
            x.iter().zip(&which).map(call).collect::<Vec<_>>(),
            "{build:?}"
        );

        d.run("virtual_calls", 2, 64, &[&a, &b, &100i32]);
        for (i, got) in d.download::<f32>(b, 100).into_iter().enumerate() {
            let v = f64::from(x[i]);
            let want = [2.0 * v * v, 2.0 * 3.25 * v * v + 1.0, 2.0 * (2.0 * v * v + 2.0 * v)][i % 3];
            near(f64::from(got), want, 8.0 * U32 * 8.0, (build, i));
        }
    }
}

#[derive(Clone, Copy)]
struct Big {
    d: f64,
    f: [f32; 5],
    s: i16,
    c: [i8; 3],
}

fn mix(mut x: Big, k: i32, p: (f64, f64)) -> Big {
    x.d = x.d.mul_add(p.0, p.1);
    (0..5).for_each(|i| x.f[i as usize] += (k * i) as f32);
    x.s = i32::from(x.s).wrapping_mul(k) as i16;
    x.c[(k & 1) as usize] = (i32::from(x.c[2]) - k) as i8;
    x
}

#[test]
fn structs_by_value() {
    for build in BUILDS {
        let mut d = Device::new("calls.cu", build);
        let base = Big { d: 1.75, f: [0.5, 1.5, -2.0, 3.0, 8.0], s: 1234, c: [1, -2, 77] };
        let mut bytes = base.d.to_le_bytes().to_vec();
        base.f.iter().for_each(|f| bytes.extend(f.to_le_bytes()));
        bytes.extend(base.s.to_le_bytes());
        bytes.extend(base.c.map(|c| c as u8));
        bytes.resize(40, 0); // 33 bytes, aligned to 8
        let out = d.empty::<f64>(90);
        d.run("struct_by_value", 3, 32, &[&bytes, &out, &90i32]);
        for (i, got) in d.download::<f64>(out, 90).into_iter().enumerate() {
            let mut b = base;
            b.s += i as i16;
            let r = mix(mix(b, i as i32, (0.5, 1.0)), 3, (-1.0, i as f64));
            // All whole multiples of 1/8: no rounding at all.
            let f: f64 = r.f.iter().enumerate().map(|(j, f)| f64::from(*f) * (j + 1) as f64).sum();
            let c: f64 = r.c.iter().enumerate().map(|(j, c)| f64::from(*c) * (j + 100) as f64).sum();
            assert_eq!(got, r.d + f64::from(r.s) + f + c, "{build:?} {i}");
        }
    }
}

fn execute(code: &[u8], input: i32) -> i32 {
    let (mut stack, mut pc, mut steps) = (vec![input], 0usize, 0i32);
    while pc < code.len() {
        steps += 1;
        if steps >= 500 {
            break;
        }
        pc += 1;
        let op = code[pc - 1];
        let top = *stack.last().unwrap();
        if matches!(op, 1 | 2 | 5 | 7 | 8) {
            stack.pop();
            let under = stack.last_mut().unwrap();
            *under = match op {
                1 => under.wrapping_add(top),
                2 => under.wrapping_mul(top),
                5 => under.wrapping_sub(top),
                7 => *under ^ top,
                _ => *under & top,
            };
            continue;
        }
        match op {
            0 => stack.push(top),
            3 => {
                let n = stack.len();
                stack.swap(n - 1, n - 2);
            }
            4 => {
                stack.push(i32::from(code[pc]));
                pc += 1;
            }
            6 => {
                stack.pop();
                if top > 0 { pc -= code[pc] as usize + 1 } else { pc += 1 }
            }
            9 => *stack.last_mut().unwrap() = top >> 1,
            10 => drop(stack.pop()),
            11 => *stack.last_mut().unwrap() = top / 3 + top % 7,
            _ => break,
        }
    }
    let top = *stack.last().unwrap();
    top.wrapping_add(stack.len() as i32 * 1_000_003).wrapping_add(steps)
}

#[test]
fn stack_machine() {
    // acc = x; n = x & 31: do { acc = acc * 3 ^ n; n -= 1 } while n > 0; then some more of each.
    let code: [u8; 30] = [
        0, 4, 31, 8, // acc n
        3, 4, 3, 2, 3, // acc*3 n
        0, 0, 3, 10, // n on top twice
        4, 7, 7, 10, // and away again
        4, 1, 5, // n - 1
        0, 6, 17, // back to the swap while n > 0
        10, 9, 0, 11, 1, 12, 0,
    ];
    for build in BUILDS {
        let mut d = Device::new("calls.cu", build);
        let x = Rng(66).vec(70, |r| r.u32() as i32 >> 3);
        let (c, a, b) = (d.upload(&code), d.upload(&x), d.empty::<i32>(70));
        d.run("stack_machine", 3, 32, &[&c, &(code.len() as i32), &a, &b, &70i32]);
        let want: Vec<i32> = x.iter().map(|v| execute(&code, *v)).collect();
        assert_eq!(d.download::<i32>(b, 70), want, "{build:?}");
    }
}

/// Laplace's expansion.
fn determinant(m: &[f64], n: usize) -> f64 {
    if n == 1 {
        return m[0];
    }
    let minor = |c: usize| -> Vec<f64> {
        (1..n)
            .flat_map(|r| (0..n).filter(move |j| *j != c).map(move |j| (r, j)))
            .map(|(r, j)| m[r * n + j])
            .collect()
    };
    (0..n).map(|c| if c % 2 == 0 { 1.0 } else { -1.0 } * m[c] * determinant(&minor(c), n - 1)).sum()
}

#[test]
fn determinants() {
    for build in [SM80, SM90, DEBUG] {
        let mut d = Device::new("calls.cu", build);
        let mut x = Rng(67).vec(25 * 40, Rng::f64);
        x[..25].fill(0.5); // singular
        let (a, b) = (d.upload(&x), d.empty::<f64>(40));
        d.run("determinants", 2, 32, &[&a, &b, &40i32]);
        for (i, got) in d.download::<f64>(b, 40).into_iter().enumerate() {
            // Growth with partial pivoting is at most 2^4; |det| <= 5^2.5 of entries up to 1.
            near(got, determinant(&x[i * 25..][..25], 5), 25.0 * 16.0 * 56.0 * U64, (build, i));
        }
    }
}

fn tangled(mut v: i32) -> i32 {
    let mut r = 0i32;
    loop {
        'walk: for a in 0..10 {
            if v < 0 {
                return r - 1;
            }
            for b in a..10 {
                r += a ^ b;
                if (v + b) % 11 == 0 {
                    break 'walk;
                }
                if (v ^ a) % 5 == 0 {
                    break;
                }
                if r & 15 != 7 {
                    r += 2;
                }
            }
            v = v * 3 - a;
            if v > 1000 {
                v -= 1013;
            }
        }
        if r % 3 != 1 || r >= 500 {
            return r;
        }
        v += r % 17;
        r += 1;
    }
}

#[test]
fn tangled_control_flow() {
    for build in BUILDS {
        let mut d = Device::new("calls.cu", build);
        let x: Vec<i32> = (0..400).map(|i| i * 5 - 100).collect();
        let (a, b) = (d.upload(&x), d.empty::<i32>(400));
        d.run("tangled", 4, 128, &[&a, &b, &400i32]);
        assert_eq!(d.download::<i32>(b, 400), x.iter().map(|v| tangled(*v)).collect::<Vec<_>>(), "{build:?}");
    }
}
