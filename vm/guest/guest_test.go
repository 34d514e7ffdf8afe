package guest

import (
	"fmt"
	"os"
	"testing"
)

// TestMain lets the test binary be the first process of a sandbox, or a builtin
// builder, as nbd is; and a hostile builder.
func TestMain(m *testing.M) {
	Enter()
	if attack := attacks[os.Args[0]]; attack != nil {
		if err := attack(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}
