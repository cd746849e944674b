//! What no driver may get away with, for every device: the lines of the checklist are functions, each device a
//! [`Subject`], and each line is a test of each device. What is said about one kind of device alone is in its own tests;
//! `docs/hostile.md` has both.
//!
//! After each wrong a device must have answered or given up, and work again after a reset.

mod chains;
mod document;
mod indirect;
mod lifecycle;
mod liveness;
mod memory;
mod races;
mod registers;
mod rings;
mod subject;
mod subjects;

use subject::Subject;

/// The tests of a device.
macro_rules! checklist {
    ($device:ident) => {
        mod $device {
            checklist!(@ $device whatever_serves_the_queues);
            checklist!(@ $device, rings:
                an_avail_idx_that_runs_ahead,
                an_avail_idx_that_goes_backwards,
                rings_at_the_edges_of_memory_work,
                indices_that_wrap,
            );
            checklist!(@ $device, chains:
                loops,
                indices_out_of_range,
                buffers_outside_of_memory,
                a_readable_buffer_after_a_writable_one,
                empty_descriptors,
                a_byte_in_each_descriptor,
                as_many_descriptors_as_the_queue_has,
                chains_of_nothing,
                buffers_of_the_wrong_direction,
                requests_cut_short_anywhere,
                buffers_over_the_rings,
                buffers_over_each_other,
                chains_as_long_as_can_be,
            );
            checklist!(@ $device, indirect:
                tables_that_were_not_negotiated,
                tables_in_order,
                tables_that_are_wrong,
                tables_that_change,
            );
            checklist!(@ $device, races:
                descriptors_that_change,
                requests_that_change,
                a_configuration_that_is_read_and_written_meanwhile,
            );
            checklist!(@ $device, liveness:
                a_flood_leaves_the_loop_to_others,
                answers_that_nobody_takes,
                interrupts_are_neither_lost_nor_unwanted,
            );
            checklist!(@ $device, lifecycle:
                parked_under_load,
                replaced_under_load,
            );
        }
    };
    // Another process looks into the queues.
    ($device:ident without queues) => {
        mod $device {
            checklist!(@ $device whatever_serves_the_queues);
        }
    };
    (@ $device:ident whatever_serves_the_queues) => {
        checklist!(@ $device, rings:
            rings_outside_of_memory,
            sizes_that_cannot_be,
            the_smallest_queues,
            a_queue_that_is_ready_without_addresses,
            rings_over_each_other,
            any_queue_broken,
            any_queue_missing,
        );
        checklist!(@ $device, registers:
            any_access_in_every_state,
            queues_are_frozen_while_the_device_works,
            processors_that_fight_over_the_status,
        );
        checklist!(@ $device, liveness:
            a_storm_of_kicks_with_nothing_to_do,
            full_queues_without_end,
        );
        checklist!(@ $device, memory:
            a_flood_costs_no_memory,
        );
        checklist!(@ $device, lifecycle:
            reset_under_load,
            dropped_under_load,
            an_event_loop_that_refuses_the_device,
        );
    };
    (@ $device:ident, $room:ident: $($line:ident,)*) => {
        $(
            #[test]
            fn $line() {
                let name = concat!("virtio::hostile::", stringify!($device), "::", stringify!($line));
                crate::virtio::hostile::$room::$line(crate::virtio::hostile::subjects::$device().named(name));
            }
        )*
    };
}

checklist!(balloon);
checklist!(blk);
checklist!(blk_uring);
checklist!(console);
checklist!(fs);
checklist!(mem);
checklist!(net);
checklist!(pmem);
checklist!(rng);
checklist!(vhost_user without queues);
checklist!(vsock);
