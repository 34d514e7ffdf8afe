package guest

import (
	"os"
	"testing"

	"nbd/vm/link"
)

// TestMain lets the test binary be the first process of a sandbox, as nbd is.
func TestMain(m *testing.M) {
	if os.Args[0] == link.SandboxArg0 {
		Sandbox()
	}
	os.Exit(m.Run())
}
