package server

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"nbd/nixproto"
	"nbd/server/adminapi"
	"nbd/store"
)

// TestMaxStorage: past it nothing is taken and nothing is built, by name of the
// setting; what is there is still served, and more room helps at once.
func TestMaxStorage(t *testing.T) {
	ts := newTestServer(t, nil)
	admin := ts.admin()
	alice := adminapi.SettingsOwner{Account: "alice"}
	a, b := textPath(t, "a", "text"), textPath(t, "b", "text")
	ts.upload(ts.account.ID, a)
	w := ts.worker(ts.alice)
	set(t, admin, alice, "max-storage", fmt.Sprint(len(a.nar)+len(b.nar)-1))
	add := &nixproto.AddToStoreNar{Info: b.PathInfo}
	if text := w.refused(t, add, raw(b.nar)); !strings.Contains(text, "max-storage") {
		t.Error(text)
	}
	built := nixproto.DerivedPath{Path: testDrv, Outputs: []string{"out"}}
	w.do(t, &nixproto.BuildPathsWithResults{Paths: []nixproto.DerivedPath{built}}, nil) // there is room yet
	set(t, admin, alice, "max-storage", fmt.Sprint(len(a.nar)))
	if text := w.refused(t, &nixproto.BuildPaths{Paths: []nixproto.DerivedPath{built}}, nil); !strings.Contains(text, "max-storage") {
		t.Error(text)
	}
	w.do(t, &nixproto.BuildPaths{Paths: []nixproto.DerivedPath{{Path: a.Path}}}, nil) // as clients do before they copy it
	set(t, admin, alice, "max-storage", fmt.Sprint(len(a.nar)+len(b.nar)))
	w.do(t, add, raw(b.nar))
}

// A fixedSize is a view of that size; it counts how often it was asked for.
type fixedSize struct{ size, asked int64 }

func (f *fixedSize) ViewSize(context.Context, store.AccountID) (int64, error) {
	f.asked++
	return f.size, nil
}

// TestStorageMeter: who is below his limit costs no look at the store, and nobody
// gets past it by many small steps.
func TestStorageMeter(t *testing.T) {
	sizes := &fixedSize{size: 10}
	m := &storageMeter{sizes: sizes}
	for i := range 90 {
		if ok, err := m.add(t.Context(), 1, 1, 100); !ok || err != nil {
			t.Fatalf("byte %d: %v, %v", i, ok, err)
		}
	}
	if sizes.asked != 1 {
		t.Errorf("counted %d times", sizes.asked)
	}
	if ok, err := m.add(t.Context(), 1, 1, 100); ok || err != nil {
		t.Errorf("past the limit: %v, %v", ok, err)
	}
}
