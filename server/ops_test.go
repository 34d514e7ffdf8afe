package server

import (
	"errors"
	"testing"

	"nbd/nixproto"
	"nbd/store"
)

func TestPlainSelfAddress(t *testing.T) {
	const a = nixproto.StorePath("/nix/store/0kw9sqbpi4gxdx61qalfkfjwavysambn-a")
	const b = nixproto.StorePath("/nix/store/1kw9sqbpi4gxdx61qalfkfjwavysambn-b")
	const ca = "fixed:r:sha256:0mj7f31nyy7vlpkkr6ir5ppdykf721f2f67nnafaz4dz2b34b7fj"
	tests := []struct {
		name string
		refs []nixproto.StorePath
		ca   string
		want string
	}{
		{"refers to itself", []nixproto.StorePath{a, b}, ca, ""},
		{"refers to another", []nixproto.StorePath{b}, ca, ca},
		{"refers to nothing", nil, ca, ca},
		{"has no address", []nixproto.StorePath{a}, "", ""},
	}
	for _, tt := range tests {
		info := &nixproto.PathInfo{Path: a, References: tt.refs, CA: tt.ca}
		if got := plainSelfAddress(info); got.CA != tt.want {
			t.Errorf("%s: address %q, want %q", tt.name, got.CA, tt.want)
		}
		if info.CA != tt.ca {
			t.Errorf("%s: the record itself was changed", tt.name)
		}
	}
}

// TestCollectionEndsLeases: what a session learns after it collected is kept
// until the session ends, and no longer.
func TestCollectionEndsLeases(t *testing.T) {
	ts := newTestServer(t, nil)
	p := textPath(t, "kept", "x")
	ts.upload(ts.account.ID, p)
	w := ts.worker(ts.alice)
	w.do(t, &nixproto.CollectGarbage{Action: nixproto.GCReturnDead}, nil)
	w.do(t, &nixproto.IsValidPath{Path: p.Path}, nil)
	if _, err := ts.store.Delete(t.Context(), ts.account.ID, p.Path); !errors.Is(err, store.ErrInUse) {
		t.Errorf("delete while the session is open: %v", err)
	}
	if err := w.pipe.Close(); err != nil {
		t.Fatal(err)
	}
	w.pipe.status(t)
	if _, err := ts.store.Delete(t.Context(), ts.account.ID, p.Path); err != nil {
		t.Errorf("delete after the session: %v", err)
	}
}
