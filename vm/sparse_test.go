package vm

import (
	"bytes"
	"testing"
)

// TestScrub makes holes where a guest's memory is zero or freed, and changes
// nothing else.
func TestScrub(t *testing.T) {
	const size = 8 << 20
	ram, err := memfd("scrub", size)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	want := make([]byte, size)
	data := func(off, n int) { copy(want[off:off+n], bytes.Repeat([]byte{1, 2, 3, 4}, n/4)) }
	freed := func(off, n int) { copy(want[off:off+n], bytes.Repeat([]byte{poison}, n)) }
	data(0, 64<<10)
	want[100<<10] = 7 // a page with one byte
	freed(128<<10, minPoison-guestPage)
	freed(2<<20, minPoison)
	data(4<<20, 12<<10)
	if _, err := ram.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := scrub(ram, size); err != nil {
		t.Fatal(err)
	}
	clear(want[2<<20 : 2<<20+minPoison])
	got := make([]byte, size)
	if _, err := ram.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other bytes than expected, %v", err)
	}
	const used = 64<<10 + guestPage + minPoison - guestPage + 12<<10
	if n := allocated(t, ram); n != used {
		t.Errorf("%d bytes are allocated, want %d", n, used)
	}
}
