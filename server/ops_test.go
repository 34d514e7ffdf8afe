package server

import (
	"testing"

	"nbd/nixproto"
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
