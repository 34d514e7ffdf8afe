package store_test

import (
	"errors"
	"fmt"
	"testing"

	"nbd/nixproto"
	"nbd/store"
	"nbd/store/storetest"
)

// TestLeaseShrinks: a lease keeps what is there, and does not grow with what is
// not.
func TestLeaseShrinks(t *testing.T) {
	s := storetest.Open(t)
	a := storetest.Account(t, s, "alice")
	nar := storetest.File("x", false)
	there, later := storetest.Source("there", nar), storetest.Source("later", nar)
	storetest.Add(t, s, a, there, nar)
	lease := s.NewLease(a)
	defer lease.Release()
	shrink := func() {
		t.Helper()
		if err := lease.Shrink(ctx); err != nil {
			t.Fatal(err)
		}
	}
	lease.Add(there.Path, later.Path)
	shrink() // small yet: nothing happens
	storetest.Add(t, s, a, later, nar)
	if _, err := s.Delete(ctx, a, later.Path); !errors.Is(err, store.ErrInUse) {
		t.Errorf("delete what a small lease has: %v", err)
	}
	absent := make([]nixproto.StorePath, 20_000)
	for i := range absent {
		absent[i] = nixproto.StorePath(fmt.Sprintf("%s/%032d-absent", nixproto.StoreDir, i))
	}
	gone := storetest.Source("gone", nar)
	lease.Add(append(absent, gone.Path)...)
	shrink()
	storetest.Add(t, s, a, gone, nar)
	if _, err := s.Delete(ctx, a, there.Path, later.Path); !errors.Is(err, store.ErrInUse) {
		t.Errorf("delete what the lease has: %v", err)
	}
	if _, err := s.Delete(ctx, a, gone.Path); err != nil {
		t.Errorf("delete what was not there when the lease shrank: %v", err)
	}
	lease.Release()
	shrink()
	if _, err := s.Delete(ctx, a, there.Path, later.Path); err != nil {
		t.Errorf("delete after the lease: %v", err)
	}
}
