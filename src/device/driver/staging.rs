//! Copies between host and GPU: through page-locked memory, so that the host need not wait.

use super::*;

/// Page-locked memory in parts. A part is filled by several small writes or by a section of a large one, and may be filled again
/// when its copies are complete.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) memory: *mut u8,
    /// Recorded behind the last copy from each part.
    pub(super) events: [sys::CUevent; STAGING_PARTS],
    pub(super) part: usize,
    pub(super) filled: usize,
}

/// Page-locked memory that receives a read from the device.
#[derive(Debug)]
pub(super) struct Landing {
    pub(super) memory: *mut u8,
    /// Bytes that it has room for, and of the last copy.
    pub(super) room: usize,
    pub(super) bytes: usize,
    /// Recorded behind the copy.
    pub(super) event: sys::CUevent,
    /// Its index in the list. Whoever waits for the bytes has a clone.
    pub(super) number: Arc<usize>,
}
impl State {
    pub(super) fn write(&mut self, dst: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        // Only memory that no step held back can know of may be written ahead of them.
        let ahead = self.sequence.as_ref().is_none_or(|s| s.fresh.get(&dst) == Some(&s.steps.len()));
        if !ahead {
            self.submit()?;
        }
        let mut done = 0;
        while done < bytes.len() {
            let (room, at) = self.staging_room()?;
            let n = room.min(bytes.len() - done);
            // SAFETY: `at` has room for `n` bytes that no copy under way reads; the copy that is asked for here reads
            // them before this part's event, which is waited for before they are written again.
            let result = unsafe {
                ptr::copy_nonoverlapping(bytes[done..].as_ptr(), at, n);
                sys::cuMemcpyHtoDAsync_v2(dst + done as u64, at.cast(), n, self.stream)
            };
            self.check("copy to the GPU", result)?;
            self.staging.filled += n.next_multiple_of(64);
            done += n;
        }
        Ok(())
    }

    /// Gets the page-locked memory, once.
    pub(super) fn page_lock(&mut self) -> Result<(), DeviceError> {
        if self.staging.memory.is_null() {
            let mut memory = ptr::null_mut();
            // SAFETY: the pointers are to locals; what is made is given back when the state is dropped.
            unsafe {
                let bytes = STAGING_PARTS * STAGING_PART;
                self.check("get page-locked memory", sys::cuMemHostAlloc(&mut memory, bytes, 0))?;
                self.staging.memory = memory.cast();
                for part in 0..STAGING_PARTS {
                    let result = sys::cuEventCreate(&mut self.staging.events[part], NO_TIMING);
                    self.check("make an event", result)?;
                }
            }
        }
        Ok(())
    }

    /// Where the next bytes for the device go, and how many there is room for: at least one.
    pub(super) fn staging_room(&mut self) -> Result<(usize, *mut u8), DeviceError> {
        self.page_lock()?;
        if self.staging.filled >= STAGING_PART {
            // SAFETY: events and stream exist. The event of a part that was never left counts as done.
            unsafe {
                let left = self.staging.events[self.staging.part];
                self.check("mark the end of copies", sys::cuEventRecord(left, self.stream))?;
                self.staging.part = (self.staging.part + 1) % STAGING_PARTS;
                self.staging.filled = 0;
                let entered = self.staging.events[self.staging.part];
                self.check("wait for copies", sys::cuEventSynchronize(entered))?;
            }
        }
        let Staging { memory, part, filled, .. } = self.staging;
        // SAFETY: within the page-locked memory.
        Ok((STAGING_PART - filled, unsafe { memory.add(part * STAGING_PART + filled) }))
    }

    pub(super) fn read(&mut self, src: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.submit()?;
        let copied = match bytes.len() {
            0..=MAX_DIRECT => {
                // SAFETY: the slice is not touched before the stream has been waited for.
                let result = unsafe {
                    let to = bytes.as_mut_ptr().cast();
                    sys::cuMemcpyDtoHAsync_v2(to, src, bytes.len(), self.stream)
                };
                self.check("copy from the GPU", result)
            }
            _ => self.read_staged(src, bytes),
        };
        // Also after an error: no copy must outlive the slice, or fill a part that is used for others.
        self.wait().and(copied)
    }

    /// Reads through the parts of page-locked memory one after the other, at the full speed of the bus: while the host takes
    /// one part out, the next ones are filled. Copies to the device from these parts were asked for earlier in the stream, and
    /// have read them by then.
    pub(super) fn read_staged(&mut self, src: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.page_lock()?;
        let len = bytes.len();
        let sections = len.div_ceil(STAGING_PART);
        for i in 0..sections + STAGING_PARTS {
            let event = self.staging.events[i % STAGING_PARTS];
            // SAFETY: within the page-locked memory.
            let part = unsafe { self.staging.memory.add(i % STAGING_PARTS * STAGING_PART) };
            let range = |i: usize| i * STAGING_PART..len.min((i + 1) * STAGING_PART);
            if let Some(full) = i.checked_sub(STAGING_PARTS) {
                let section = &mut bytes[range(full)];
                // SAFETY: events exist; after this one, nothing writes to the part until it is asked for again below.
                unsafe {
                    self.check("wait for copies", sys::cuEventSynchronize(event))?;
                    ptr::copy_nonoverlapping(part, section.as_mut_ptr(), section.len());
                }
            }
            if i < sections {
                let range = range(i);
                // SAFETY: a part has room for a section, and lives until the stream has been waited for.
                unsafe {
                    let (from, n) = (src + range.start as u64, range.len());
                    let copied = sys::cuMemcpyDtoHAsync_v2(part.cast(), from, n, self.stream);
                    self.check("copy from the GPU", copied)?;
                    self.check("mark the end of copies", sys::cuEventRecord(event, self.stream))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn begin_read(&mut self, src: u64, bytes: usize) -> Result<Reading, DeviceError> {
        self.submit()?;
        let number = self.landing(bytes)?;
        let Landing { memory, event, .. } = self.landings[*number];
        // SAFETY: the place has room for the bytes, and nobody reads it before the event behind this copy has passed;
        // an earlier copy that nobody waits for any more comes first. Event and stream exist.
        unsafe {
            let result = sys::cuMemcpyDtoHAsync_v2(memory.cast(), src, bytes, self.stream);
            self.check("copy from the GPU", result)?;
            self.check("mark the end of a copy", sys::cuEventRecord(event, self.stream))?;
        }
        self.landings[*number].bytes = bytes;
        Ok(Reading::UnderWay(number))
    }

    pub(super) fn end_read(&mut self, reading: Reading) -> Result<Vec<u8>, DeviceError> {
        let number = match reading {
            Reading::Done(bytes) => return Ok(bytes),
            Reading::UnderWay(number) => number,
        };
        let landing = self.landings.get(*number).filter(|landing| Arc::ptr_eq(&landing.number, &number));
        let Some(&Landing { memory, bytes, event, .. }) = landing else {
            return Err(DeviceError::new(&self.name, "the read is another device's"));
        };
        // SAFETY: the event was recorded behind the copy of so many bytes, which are all that is read.
        unsafe {
            self.check("wait for a copy from the GPU", sys::cuEventSynchronize(event))?;
            Ok(std::slice::from_raw_parts(memory, bytes).to_vec())
        }
    }

    /// A place for `bytes` bytes that nobody waits at.
    pub(super) fn landing(&mut self, bytes: usize) -> Result<Arc<usize>, DeviceError> {
        let fits = |place: &&Landing| Arc::strong_count(&place.number) == 1 && place.room >= bytes;
        if let Some(place) = self.landings.iter().find(fits) {
            return Ok(Arc::clone(&place.number));
        }
        let number = Arc::new(self.landings.len());
        let room = bytes.next_power_of_two().max(MIN_LANDING);
        let (mut memory, mut event) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the pointers are to locals; what is made is given back when the state is dropped.
        unsafe {
            self.check("get page-locked memory", sys::cuMemHostAlloc(&mut memory, room, 0))?;
            let memory = memory.cast();
            self.landings.push(Landing { memory, room, bytes: 0, event, number: Arc::clone(&number) });
            self.check("make an event", sys::cuEventCreate(&mut event, NO_TIMING))?;
        }
        self.landings[*number].event = event;
        Ok(number)
    }

    // ------------------------------------------------------------------------------------------------------ work
}
