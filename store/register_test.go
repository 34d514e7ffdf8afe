package store

import (
	"errors"
	"fmt"
	"testing"

	"nbd/nixproto"
)

// Long chains, which somebody may have built up to slow others down, are looked
// at once; with a look at each for each this would take hours.
func TestAcyclicLongChain(t *testing.T) {
	const n = 200_000
	path := func(i int) nixproto.StorePath {
		return nixproto.StorePath(fmt.Sprintf("%s/%032d-x", nixproto.StoreDir, i))
	}
	refs := make(map[nixproto.StorePath][]nixproto.StorePath, n)
	for i := range n {
		refs[path(i)] = []nixproto.StorePath{path(i), path(i + 1)}
	}
	if err := checkAcyclic(refs); err != nil {
		t.Error(err)
	}
	refs[path(n-1)] = []nixproto.StorePath{path(n / 2)}
	if err := checkAcyclic(refs); !errors.Is(err, ErrInvalid) {
		t.Errorf("a circle: %v", err)
	}
}
