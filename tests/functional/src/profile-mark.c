// SPDX-License-Identifier: GPL-2.0-only
/* Do nothing, in a way that tests/bench/profile.c takes notice of. */

int main(void)
{
	/* nopl 0x776f6371(%rax) */
	__asm__ volatile(".byte 0x0f, 0x1f, 0x80, 0x71, 0x63, 0x6f, 0x77");
	return 0;
}
