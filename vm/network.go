package vm

import (
	"context"
	"errors"
	"fmt"
	"net"

	"nbd/nixproto"
	"nbd/vm/usernet"
)

// A guest has a network device only if its build is of a fixed output. The
// device is plugged in after the guest woke, so that all guests are clones of the
// same templates; what is behind it is no part of a saved guest.

const (
	netBackend = "net"  // QEMU's end of the link to package usernet
	netPort    = "plug" // where the device is plugged in
)

// netArguments are QEMU's arguments for a guest with a network.
func netArguments() []string {
	return []string{"-netdev", fmt.Sprintf("stream,id=%s,server=off,addr.type=fd,addr.str=%d", netBackend, fdNetwork)}
}

// startNetwork makes the guest's network.
func (g *guestVM) startNetwork(cfg usernet.Config, conn net.Conn) error {
	n, err := usernet.New(cfg, conn)
	if err != nil {
		return err
	}
	g.network = n
	g.cleanup = append(g.cleanup, n.Close)
	return nil
}

// plugNetwork gives the guest its device.
func (g *guestVM) plugNetwork(ctx context.Context) error {
	ctx, stop := g.within(ctx, bootPatience, "the guest did not get its network device in time")
	defer stop()
	device := map[string]any{
		"driver": "virtio-net-pci", "id": netBackend + "0", "bus": netPort, "netdev": netBackend,
		"mac": usernet.MAC, "host_mtu": usernet.MTU,
		"romfile": "", // nobody boots from it
	}
	if err := g.qmp.do(ctx, "device_add", device, nil, nil); err != nil {
		return g.explain(fmt.Errorf("give guest a network: %w", err))
	}
	return nil
}

// checkNetwork refuses a network for a build that must have none.
func (s *Spec) checkNetwork() error {
	if s.Network == nil {
		return nil
	}
	if kind, err := s.Drv.Kind(); err != nil || kind != nixproto.FixedOutput {
		return errors.New("only builds of fixed outputs have a network")
	}
	return nil
}
