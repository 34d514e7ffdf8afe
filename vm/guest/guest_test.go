package guest

import (
	"os"
	"testing"
)

// TestMain lets the test binary be the first process of a sandbox, or a builtin
// builder, as nbd is.
func TestMain(m *testing.M) {
	Enter()
	os.Exit(m.Run())
}
