//! `ptxvm report`: the counters of a launch.

use std::collections::BTreeMap;
use std::io::Write;

use ptxvm::Report;
use ptxvm::machine::counters::MemoryCount;
use ptxvm::report::{ClassCount, LineCount};
use serde_json::{Map, Value, json};

use super::{Failure, Heat, ReportArgs, launch, usage};

pub(crate) fn report(args: &ReportArgs) -> Result<(), Failure> {
    if args.json && launch::prints(&args.launch) {
        return usage("--json and `-` in --arg both want standard output; save the buffer to a file");
    }
    let done = launch::launch(&args.launch)?;
    let mut out = std::io::stdout().lock();
    let lines: Vec<&str> = done.text.lines().collect();
    let text = |n: u32| lines.get((n as usize).wrapping_sub(1)).map_or("", |line| line.trim());
    if args.json {
        writeln!(out, "{}", json(&done.report, &text))?;
    } else {
        out.write_all(done.report.printed.as_bytes())?;
        done.tell()?;
        writeln!(out, "{}", done.report)?;
        let rows = done.report.lines.iter().map(|line| (line, told(line, text(line.line)))).collect();
        table(&mut out, "lines of the PTX", rows, args)?;
        let sources = sources(&done.report.lines);
        if !sources.is_empty() {
            let rows = sources.iter().map(|line| (line, line.source.clone().unwrap_or_default())).collect();
            table(&mut out, "lines of the source", rows, args)?;
        }
    }
    done.save(&mut out)?;
    out.flush()?;
    Ok(())
}

fn told(line: &LineCount, text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match &line.source {
        Some(source) => format!("{}: {text} ({source})", line.line),
        None => format!("{}: {text}", line.line),
    }
}

/// The counts of each line of the source: sums over the lines of the PTX that come from it.
fn sources(lines: &[LineCount]) -> Vec<LineCount> {
    let mut sums: BTreeMap<&str, LineCount> = BTreeMap::new();
    for line in lines {
        let Some(source) = &line.source else { continue };
        match sums.get_mut(source.as_str()) {
            None => {
                sums.insert(source, line.clone());
            }
            Some(sum) => {
                sum.warps += line.warps;
                sum.lanes += line.lanes;
                sum.divergent += line.divergent;
                let (m, add) = (&mut sum.memory, &line.memory);
                m.requests += add.requests;
                m.sectors += add.sectors;
                m.ideal_sectors += add.ideal_sectors;
                m.bytes += add.bytes;
                m.wavefronts += add.wavefronts;
                m.ideal_wavefronts += add.ideal_wavefronts;
            }
        }
    }
    sums.into_values().collect()
}

/// The hottest of these lines, the first of equals first.
fn table(
    out: &mut dyn Write,
    title: &str,
    mut rows: Vec<(&LineCount, String)>,
    args: &ReportArgs,
) -> Result<(), Failure> {
    let heat = |line: &LineCount| match args.by {
        Heat::Instructions => line.warps,
        Heat::Sectors => line.memory.sectors,
        Heat::Wavefronts => line.memory.wavefronts,
        Heat::Divergent => line.divergent,
    };
    rows.retain(|(line, _)| heat(line) > 0);
    rows.sort_by_key(|(line, _)| std::cmp::Reverse(heat(line)));
    let shown = rows.len().min(args.top);
    writeln!(out, "\nhottest {title}, {shown} of {}", rows.len())?;
    if shown == 0 {
        return Ok(());
    }
    let pair = |n: u64, ideal: u64| if n == 0 { String::new() } else { format!("{n}/{ideal}") };
    writeln!(
        out,
        "{:>12} {:>6} {:>10} {:>21} {:>21}",
        "warps", "lanes", "divergent", "sectors/ideal", "wavefronts/ideal"
    )?;
    for (line, text) in &rows[..shown] {
        let m = &line.memory;
        // Of 32, on average.
        let lanes = line.lanes as f64 / line.warps as f64;
        writeln!(
            out,
            "{:>12} {lanes:>6.1} {:>10} {:>21} {:>21}  {text}",
            line.warps,
            line.divergent,
            pair(m.sectors, m.ideal_sectors),
            pair(m.wavefronts, m.ideal_wavefronts)
        )?;
    }
    Ok(())
}

fn memory(m: &MemoryCount) -> Value {
    json!({
        "requests": m.requests,
        "bytes": m.bytes,
        "sectors": m.sectors,
        "ideal_sectors": m.ideal_sectors,
        "wavefronts": m.wavefronts,
        "ideal_wavefronts": m.ideal_wavefronts,
    })
}

/// Every figure of the report, on one line.
fn json<'a>(report: &Report, text: &dyn Fn(u32) -> &'a str) -> Value {
    let count = |count: &ClassCount| json!({ "warps": count.warps, "lanes": count.lanes });
    let line = |line: &LineCount| {
        json!({
            "line": line.line,
            "text": text(line.line),
            "source": line.source,
            "warps": line.warps,
            "lanes": line.lanes,
            "divergent": line.divergent,
            "memory": memory(&line.memory),
        })
    };
    let classes = report.classes.iter().map(|(class, n)| (format!("{class:?}"), count(n)));
    let (read, written) = report.unique_sectors;
    json!({
        "kernel": report.kernel,
        "grid": report.grid,
        "block": report.block,
        "shared_bytes": report.shared_bytes,
        "instructions": count(&report.instructions()),
        "classes": classes.collect::<Map<_, _>>(),
        "flops": report.flops,
        "mma_flops": report.mma_flops,
        "global": memory(&report.global),
        "shared": memory(&report.shared),
        "local": memory(&report.local),
        "unique_sectors": { "read": read, "written": written },
        "barriers": report.barriers,
        "divergent": report.divergent,
        "printed": report.printed,
        "lines": report.lines.iter().map(line).collect::<Vec<_>>(),
        "notes": report.notes.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}
