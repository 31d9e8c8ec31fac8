//! TensorBoard event files, scalars only: TFRecord frames around hand-encoded `Event` messages.
//!
//! A frame is: length (u64), masked CRC-32C of the length, the data, masked CRC-32C of the data, all little-endian.
//! Field numbers are those of TensorFlow's event.proto and summary.proto.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file that is open for appending.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
}

impl EventWriter {
    /// Opens a new event file in `dir` (made where missing). `first_step` is the first step that it will hold: what
    /// older files in `dir` say of that step and later ones, TensorBoard then forgets.
    pub fn create(dir: &Path, first_step: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard finds files by "tfevents" in the name and reads them in order of name.
        let file = (0..)
            .map(|n| dir.join(format!("events.out.tfevents.{:010}.bon-engine.{n:03}", now.as_secs())))
            .find_map(|path| match OpenOptions::new().append(true).create_new(true).open(path) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => None,
                opened => Some(opened),
            })
            .ok_or(io::ErrorKind::AlreadyExists)??;
        let mut writer = Self { file };
        let (wall_time, step) = (now.as_secs_f64(), first_step as i64);
        // Restarts are honoured from version 2 on.
        writer.append(&event(wall_time, 0, 3, b"brain.Event:2"))?;
        const START: u64 = 1;
        let mut session_log = Vec::new();
        put_varint(&mut session_log, 1, START);
        writer.append(&event(wall_time, step, 7, &session_log))?;
        Ok(writer)
    }

    /// Appends one value per tag at `step`, in one write. `wall_time` is in seconds since 1970.
    pub fn scalars(&mut self, step: u64, wall_time: f64, values: &[(String, f64)]) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            put_scalar(&mut summary, tag, *value as f32);
        }
        self.append(&event(wall_time, step as i64, 5, &summary))
    }

    fn append(&mut self, event: &[u8]) -> io::Result<()> {
        self.file.write_all(&frame(event))
    }
}

/// One TFRecord.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked_crc(data).to_le_bytes());
    out
}

/// TFRecord's checksum: CRC-32C rotated right by 15 bits, plus a constant, so that the checksum of data which holds
/// checksums stays useful.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// `Event { wall_time = 1, step = 2, <what> = payload }`. Protobuf leaves a zero out.
fn event(wall_time: f64, step: i64, what: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_key(&mut out, 1, Wire::Fixed64);
    out.extend(wall_time.to_le_bytes());
    if step != 0 {
        put_varint(&mut out, 2, step as u64);
    }
    put_bytes(&mut out, what, payload);
    out
}

/// `Summary { value = 1: Value { tag = 1, simple_value = 2 } }`, one value of it.
fn put_scalar(summary: &mut Vec<u8>, tag: &str, value: f32) {
    let mut entry = Vec::new();
    put_bytes(&mut entry, 1, tag.as_bytes());
    put_key(&mut entry, 2, Wire::Fixed32);
    entry.extend(value.to_le_bytes());
    put_bytes(summary, 1, &entry);
}

/// How protobuf lays a field's value out.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn put_key(out: &mut Vec<u8>, field: u32, wire: Wire) {
    put_raw_varint(out, u64::from(field << 3 | wire as u32));
}

fn put_varint(out: &mut Vec<u8>, field: u32, value: u64) {
    put_key(out, field, Wire::Varint);
    put_raw_varint(out, value);
}

fn put_bytes(out: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    put_key(out, field, Wire::Bytes);
    put_raw_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn put_raw_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The records that TensorBoard 2.21's own writer (`RecordWriter`, `Event.SerializeToString`) makes of the same
    /// events.
    #[test]
    fn records_are_tensorboards_byte_for_byte() {
        let mut log = Vec::new();
        put_varint(&mut log, 1, 1);
        let mut values = Vec::new();
        put_scalar(&mut values, "train/loss", 0.1);
        put_scalar(&mut values, "train/kl", 0.0);
        for (event, expected) in [
            (
                event(1.5e9, 0, 3, b"brain.Event:2"),
                "1800000000000000a37f4b2209000000c00b5ad6411a0d627261696e2e4576656e743a324ca9a464",
            ),
            (event(1.5e9, 300, 7, &log), "100000000000000095fbfe1809000000c00b5ad64110ac023a02080186d26f32"),
            (
                event(1.5e9 + 0.25, 300, 5, &values),
                "3200000000000000241956ec09000010c00b5ad64110ac022a240a110a0a747261696e2f6c6f737315cdcccc3d0a0f\
                 0a08747261696e2f6b6c150000000082c77ee5",
            ),
        ] {
            let hex: String = frame(&event).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hex, expected);
        }
    }
}
