//! Reading a device configuration space that is kept as bytes.

/// Copies what `space` has at `offset` into `data`; bytes of `data` past its end stay as they are.
pub fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let Some(rest) = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)) else {
        return;
    };
    for (target, source) in data.iter_mut().zip(rest) {
        *target = *source;
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn reads_overlap_the_end_and_go_past_it() {
        let space = [1, 2, 3];
        for (offset, expected) in [(0, [1, 2]), (1, [2, 3]), (2, [3, 0]), (3, [0, 0]), (u64::MAX, [0, 0])] {
            let mut data = [0; 2];
            super::read(&space, offset, &mut data);
            assert_eq!(data, expected, "offset {offset}");
        }
    }
}
