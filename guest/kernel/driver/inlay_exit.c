// SPDX-License-Identifier: GPL-2.0-only
/*
 * Inlay exit port: how this guest says why it ends.
 *
 * A machine without ACPI has no way to power itself off, and a panic is seen
 * from outside only as a reset. Both are told apart by one byte written to the
 * pvpanic port (QEMU, docs/specs/pvpanic.rst): bit 0, the guest panicked;
 * bit 2, the guest was shut down. The monitor ends the machine on either, so
 * the write does not return there. Where nobody listens on the port the write
 * is lost and the kernel goes on as it would without this driver.
 */

#include <linux/init.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/kernel.h>
#include <linux/notifier.h>
#include <linux/panic_notifier.h>
#include <linux/reboot.h>

#define INLAY_EXIT_PORT		0x505
#define INLAY_EXIT_PANICKED	0x01
#define INLAY_EXIT_SHUTDOWN	0x04

static int inlay_exit_panic(struct notifier_block *nb, unsigned long event,
			    void *message)
{
	/* The message is on the console by now: panic() prints it first. */
	outb(INLAY_EXIT_PANICKED, INLAY_EXIT_PORT);
	return NOTIFY_DONE;
}

static struct notifier_block inlay_exit_panic_nb = {
	.notifier_call = inlay_exit_panic,
	/* Last: whatever else wants to speak must do so before the end. */
	.priority = INT_MIN,
};

static int inlay_exit_power_off(struct sys_off_data *data)
{
	outb(INLAY_EXIT_SHUTDOWN, INLAY_EXIT_PORT);
	return NOTIFY_DONE;
}

static int __init inlay_exit_init(void)
{
	struct sys_off_handler *handler;

	if (!request_region(INLAY_EXIT_PORT, 1, "inlay-exit"))
		return -EBUSY;

	/* reboot(2) halts instead of powering off unless a handler exists. */
	handler = register_sys_off_handler(SYS_OFF_MODE_POWER_OFF,
					   SYS_OFF_PRIO_DEFAULT,
					   inlay_exit_power_off, NULL);
	if (IS_ERR(handler)) {
		release_region(INLAY_EXIT_PORT, 1);
		return PTR_ERR(handler);
	}

	return atomic_notifier_chain_register(&panic_notifier_list,
					      &inlay_exit_panic_nb);
}
/* Early, so that a panic in another driver's start is reported too. */
arch_initcall(inlay_exit_init);
