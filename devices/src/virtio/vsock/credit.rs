//! Credit-based flow control of one connection (virtio 1.2 section 5.10.6.3).
//!
//! All counters run modulo 2^32 as on the wire. Nothing that the guest announces can make
//! [`Credit::available`] exceed what it announced, nor our own buffer exceed its window.

use super::packet::Header;

/// The guest sent more than the window that it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

/// Both directions' counters of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Credit {
    /// The guest's buffer, as it last announced it.
    peer_buf_alloc: u32,
    /// What the guest has taken out of its buffer, as it last announced it.
    peer_fwd_cnt: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Our buffer.
    window: u32,
    /// Bytes that came from the guest.
    received: u32,
    /// Those of them that left our buffer.
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    announced: u32,
}

impl Credit {
    /// A fresh connection that buffers up to `window` bytes from the guest.
    pub fn new(window: u32) -> Self {
        Self { peer_buf_alloc: 0, peer_fwd_cnt: 0, sent: 0, window, received: 0, forwarded: 0, announced: 0 }
    }

    /// Bytes that may be sent to the guest now.
    pub fn available(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight)
    }

    /// Bytes of the guest's that wait in our buffer.
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Takes what a packet of the guest announces.
    pub fn learn(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
    }

    /// `count` bytes were sent to the guest.
    pub fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// `count` bytes came from the guest.
    pub fn receive(&mut self, count: u32) -> Result<(), Overrun> {
        match self.buffered().checked_add(count) {
            Some(total) if total <= self.window => {
                self.received = self.received.wrapping_add(count);
                Ok(())
            }
            _ => Err(Overrun),
        }
    }

    /// `count` bytes left our buffer.
    pub fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count.min(self.buffered()));
    }

    /// Whether enough room came free that the guest should hear of it without asking.
    ///
    /// At a quarter of the window: a guest that has used up its credit is told as soon as a
    /// quarter of it is free again, and a steady stream costs four small packets per window.
    pub fn worth_announcing(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= (self.window >> 2).max(1)
    }

    /// Writes our side into a packet for the guest.
    pub fn announce(&mut self, header: &mut Header) {
        header.buf_alloc = self.window;
        header.fwd_cnt = self.forwarded;
        self.announced = self.forwarded;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn announcement(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc, fwd_cnt, ..Header::default() }
    }

    #[test]
    fn nothing_may_be_sent_before_the_guest_announced_a_buffer() {
        assert_eq!(Credit::new(64).available(), 0);
    }

    #[test]
    fn window_is_exact() {
        let mut credit = Credit::new(64);
        assert_eq!(credit.receive(64), Ok(()));
        assert_eq!(credit.receive(1), Err(Overrun));
        credit.forward(1);
        assert_eq!(credit.receive(1), Ok(()));
        assert_eq!(credit.receive(u32::MAX), Err(Overrun));
    }

    #[test]
    fn a_guest_that_forwarded_more_than_was_sent_gets_nothing() {
        let mut credit = Credit::new(64);
        credit.learn(&announcement(u32::MAX, 1));
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn a_shrunk_buffer_means_no_credit() {
        let mut credit = Credit::new(64);
        credit.learn(&announcement(100, 0));
        credit.send(100);
        credit.learn(&announcement(10, 50));
        assert_eq!(credit.available(), 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Send(u32),
        Consume(u32),
        Receive(u32),
        Forward(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            any::<u32>().prop_map(Step::Send),
            any::<u32>().prop_map(Step::Consume),
            any::<u32>().prop_map(Step::Receive),
            any::<u32>().prop_map(Step::Forward),
        ]
    }

    proptest! {
        /// An honest pair, its counters anywhere in their range: neither buffer overflows, and
        /// what is in flight plus what is available is the guest's buffer.
        #[test]
        fn honest_peers_never_overrun(
            start in any::<u32>(),
            guest_buffer in 1_u32..1 << 20,
            window in 1_u32..1 << 20,
            steps in proptest::collection::vec(step(), 0..200),
        ) {
            let mut credit = Credit::new(window);
            credit.sent = start;
            credit.received = start;
            credit.forwarded = start;
            credit.announced = start;
            credit.learn(&announcement(guest_buffer, start));
            let (mut in_guest, mut consumed) = (0_u32, start);
            let mut in_host = 0_u32;
            for step in steps {
                match step {
                    Step::Send(n) => {
                        let n = n.min(credit.available());
                        credit.send(n);
                        in_guest += n;
                        prop_assert!(in_guest <= guest_buffer);
                    }
                    Step::Consume(n) => {
                        let n = n.min(in_guest);
                        in_guest -= n;
                        consumed = consumed.wrapping_add(n);
                        credit.learn(&announcement(guest_buffer, consumed));
                        prop_assert_eq!(credit.available(), guest_buffer - in_guest);
                    }
                    Step::Receive(n) => {
                        prop_assert_eq!(credit.receive(n).is_ok(), n <= window - in_host);
                        if n <= window - in_host {
                            in_host += n;
                        }
                    }
                    Step::Forward(n) => {
                        credit.forward(n);
                        in_host -= n.min(in_host);
                    }
                }
                prop_assert_eq!(credit.buffered(), in_host);
            }
        }

        /// A guest that announces anything at all cannot get more than it announced.
        #[test]
        fn lies_earn_nothing(sent in any::<u32>(), buf_alloc in any::<u32>(), fwd_cnt in any::<u32>()) {
            let mut credit = Credit::new(1);
            credit.send(sent);
            credit.learn(&announcement(buf_alloc, fwd_cnt));
            prop_assert!(credit.available() <= buf_alloc);
        }

        /// A guest out of credit always hears of room again once our buffer has drained.
        #[test]
        fn a_blocked_guest_is_told(window in 1_u32..1 << 20) {
            let mut credit = Credit::new(window);
            credit.receive(window).unwrap();
            credit.forward(window);
            prop_assert!(credit.worth_announcing());
            credit.announce(&mut Header::default());
            prop_assert!(!credit.worth_announcing());
        }
    }
}
