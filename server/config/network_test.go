package config

import (
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"nbd/vm/usernet"
)

// network returns what flags say of the network.
func network(t *testing.T, args ...string) (*usernet.Config, error) {
	t.Helper()
	t.Setenv("NBD_CONFIG", "")
	cmd := &cobra.Command{}
	c := New(cmd, Serve)
	if err := cmd.Flags().Parse(args); err != nil {
		t.Fatal(err)
	}
	if err := c.Load(); err != nil {
		t.Fatal(err)
	}
	return c.Network()
}

func TestNetwork(t *testing.T) {
	n, err := network(t)
	if err != nil || !slices.Equal(n.Ports, []uint16{22, 80, 443, 9418}) || n.Rate != 64<<20 || n.MaxBytes != 64<<30 {
		t.Errorf("by default: %+v, %v", n, err)
	}
	n, err = network(t, "--network-ports", "443", "--network-rate", "0", "--network-max", "1")
	if err != nil || !slices.Equal(n.Ports, []uint16{443}) || n.Rate != 0 || n.MaxBytes != 1<<20 {
		t.Errorf("%+v, %v", n, err)
	}
	if n, err := network(t, "--network=false"); n != nil || err != nil {
		t.Errorf("without: %+v, %v", n, err)
	}
	for _, bad := range []string{"http", "0", "65536", "80,-1", "80-90"} {
		if _, err := network(t, "--network-ports", bad); err == nil || !strings.Contains(err.Error(), "network-ports") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
