package guest

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
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
	if signal.Ignored(syscall.SIGHUP) {
		// By nohup; builders would inherit that. What is handled is not inherited.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	os.Exit(m.Run())
}
